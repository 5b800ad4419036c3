"""What Prometheus, the dashboard and the alert rules are checked with: scraped text, expressions, real servers."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

INFRA = Path(__file__).parents[2] / "infra"
DASHBOARD, ALERTS = INFRA / "grafana/segjobs.json", INFRA / "prometheus/alerts.yaml"
# What Grafana puts in.
VARIABLES = {"$output": ".*", "$__rate_interval": "1m"}
DEADLINE_S = 60

Labels = dict[str, str]


def needed(program: str) -> str:
    """Return where a program of the Debian package `prometheus` is, or skip the test and say so."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (Debian package prometheus)")
    return found


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def samples(text: str) -> Iterator[tuple[str, Labels, float]]:
    """Yield name, labels and value of each sample of ours in what a node's `/metrics` says."""
    ours = "\n".join(line for line in text.splitlines() if "ray_segjobs_" in line)
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            yield sample.name, dict(sample.labels), sample.value


def is_installed(program: str) -> bool:
    return shutil.which(program) is not None


def panels() -> Iterator[tuple[str, list[str]]]:
    """Yield title and expressions of each panel, as Grafana asks them."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield panel["title"], [filled(target["expr"]) for target in panel["targets"]]


def filled(expression: str) -> str:
    """Put in what Grafana does."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def alerts() -> Iterator[tuple[str, str]]:
    """Yield name and expression of each alert."""
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def used(expression: str) -> dict[str, set[str]]:
    """Return the series of an expression, and the labels that it wants of each."""
    found: dict[str, set[str]] = {}
    _collect(promql_parser.parse(expression), set(), found)
    return found


def _collect(node: Any, wanted: set[str], found: dict[str, set[str]]) -> None:
    """Walk down an expression; what groups wants its labels of all series below it."""
    if isinstance(node, promql_parser.VectorSelector):
        matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", node.prettify()))
        found.setdefault(node.name, set()).update(wanted, matched)
        return
    modifier = getattr(node, "modifier", None)
    if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
        wanted = wanted | set(modifier.labels)
    for name in ("expr", "lhs", "rhs", "args", "vector_selector"):
        below = getattr(node, name, None)
        for child in below if isinstance(below, list) else [below]:
            if child is not None:
                _collect(child, wanted, found)


class Server:
    """A real Prometheus that scrapes one node every two seconds."""

    def __init__(self, folder: Path, target: str) -> None:
        config = {
            "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
        }
        file = folder / "prometheus.yaml"
        file.write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process = subprocess.Popen(
            [
                *(needed("prometheus"), "--config.file", str(file)),
                *("--storage.tsdb.path", str(folder / "data"), "--log.level", "error"),
                *("--web.listen-address", self.url.removeprefix("http://")),
            ]
        )
        deadline = time.monotonic() + DEADLINE_S
        while not self._ready():
            assert time.monotonic() < deadline
            assert self._process.poll() is None
            time.sleep(0.2)

    def _ready(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return bool(get(f"{self.url}/-/ready"))
        return False

    def ask(self, path: str, **parameters: Any) -> Any:
        """Return the data of an answer of its API."""
        query = urllib.parse.urlencode(parameters)
        return json.loads(get(f"{self.url}/api/v1/{path}?{query}"))["data"]

    def drawn(self, expression: str, since: float) -> list[Mapping[str, Any]]:
        """Return what a panel would draw: the series with their values, one a second."""
        found = self.ask("query_range", query=expression, start=since, end=time.time(), step=1)
        return list(found["result"])

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
