"""Prometheus' own tool reads what it is given, and the alerts fire when they should, and not else."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.__main__ import VERBS
from tests.infra.rules import ROOT
from tests.jobs.prometheus import DASHBOARD, INFRA, needed, panels, used

FOLDER = INFRA / "prometheus"


def promtool(*arguments: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    command = [needed("promtool"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "prometheus"))


def test_the_alerts_fire_when_they_should() -> None:
    checked = promtool("check", "rules", "--lint=all", "alerts.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "4 rules found" in checked.stdout
    tested = promtool("test", "rules", "alerts_test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("> 0.05", "> 0.005"),
        ("> 0.05", "> 0.5"),
        ("< 0.5 *", "< 0.2 *"),
        ("[6h:5m]", "[20m:5m]"),
        ("unless on (output)\n          max by", "and on (output)\n          max by"),
        ("increase(ray_segjobs_images_total[15m])", "increase(ray_segjobs_images_total[3h])"),
        ("for: 15m", "for: 90m"),
    ],
)
def test_a_wrong_alert_is_noticed(copy: Path, old: str, new: str) -> None:
    rules = copy / "alerts.yaml"
    text = rules.read_text()
    assert old in text
    rules.write_text(text.replace(old, new))
    assert promtool("test", "rules", "alerts_test.yaml", folder=copy).returncode == 1


def test_the_scrape_configuration_can_be_read(copy: Path) -> None:
    """Debian's Prometheus is built without Kubernetes: there its pods stand as one static target."""
    file = copy / "scrape.yaml"
    config = yaml.safe_load(file.read_text())
    kuberay, ray = config["scrape_configs"]
    assert kuberay.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    kuberay["static_configs"] = [{"targets": ["pod:8080"]}]
    file.write_text(yaml.safe_dump(config))
    checked = promtool("check", "config", "--lint=all", "scrape.yaml", folder=copy)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "1 rule files found" in checked.stdout
    # Where Ray writes the nodes of a cluster.
    assert ray["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    config["scrape_configs"][0]["relabel_configs"][0]["actions"] = "keep"
    file.write_text(yaml.safe_dump(config))
    assert promtool("check", "config", "scrape.yaml", folder=copy).returncode == 1


def test_the_account_lists_each_panel_with_its_series_and_no_other() -> None:
    account = (INFRA / "grafana/README.md").read_text().split("## The series behind each panel")[1]
    rows = [line for line in account.split("## ")[0].splitlines() if line.startswith("| ")][2:]
    assert rows == [
        f"| {title} | {', '.join(f'`{name}`' for name in names)} |"
        for title, expressions in panels()
        for names in [sorted({name for asks in expressions for name in used(asks)})]
    ]


def test_the_account_says_whose_metrics_they_are() -> None:
    about = (INFRA / "grafana/README.md").read_text().split("## ")[0]
    telling = {
        verb
        for verb in VERBS
        if "from jobs.meter import" in (ROOT / "jobs" / f"{verb}.py").read_text()
    }
    assert telling == {"predict"}
    assert "are about `predict`, and `label`, which runs it" in about
    assert "A training tells Prometheus nothing" in about


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) == len(list(panels())) == 17
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == [
        "datasource",
        "output",
    ]
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert all('output=~"$output"' in target["expr"] for target in panel["targets"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
