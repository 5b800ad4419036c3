from tests.bench.gpu_table import Line, table


def _line(**given: object) -> Line:
    known = {
        **{"network": "small at 32 px", "of": "50x83", "way": "ours", "hardware": "CPU, toy sizes"},
        **{"rates": [2.0, 4.0, 3.0], "against": 1.5, "busy": None, "peak_mib": None, "note": "n"},
    }
    return Line(**(known | given))  # type: ignore[arg-type]


def test_lines_stand_in_columns_and_what_is_not_known_is_a_dash():
    first, *lines = table([_line(), _line(way="torchvision", against=None)]).splitlines()
    assert all(line.index("2 to 4") == lines[0].index("2 to 4") for line in lines)
    assert first.split("  ")[0] == "network"
    assert lines[0].split()[-3:] == ["2.00", "-", "-"]
    assert lines[1].split()[-3:] == ["-", "-", "-"]


def test_rows_have_the_median_and_nothing_that_is_not_known():
    assert [row["value"] for row in _line().rows()] == ["3", "2"]
    known = list(_line(busy=0.93, peak_mib=1024.0).rows())
    assert [(row["value"], row["unit"]) for row in known[2:]] == [
        ("0.93", "share"),
        ("1024", "MiB"),
    ]
