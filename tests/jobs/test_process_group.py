"""The interface over which workers of several nodes talk; over a real network: `test_network.py`."""

import os

import psutil
import pytest
import ray

from jobs import process_group
from jobs.process_group import GLOO_INTERFACE, choose_interface, interface


def test_the_interface_of_an_address() -> None:
    assert interface("127.0.0.1") == "lo"
    assert interface("192.0.2.77") is None
    assert interface("") is None


def test_each_address_of_this_machine_leads_to_its_interface() -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == psutil.AF_LINK:
                assert interface(one.address) is None
            else:
                assert interface(one.address) == name


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what a test sets is taken away again.
    monkeypatch.setenv(GLOO_INTERFACE, "")
    monkeypatch.delenv(GLOO_INTERFACE)


@pytest.mark.parametrize(("address", "chosen"), [("127.0.0.1", "lo"), ("192.0.2.77", None)])
def test_gloo_is_told_the_interface_of_the_node(
    monkeypatch: pytest.MonkeyPatch, address: str, chosen: str | None
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    choose_interface()
    assert os.environ.get(GLOO_INTERFACE) == chosen


def test_what_the_environment_says_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOO_INTERFACE, "eth7")
    monkeypatch.setattr(process_group, "interface", lambda _: "lo")
    choose_interface()
    assert os.environ[GLOO_INTERFACE] == "eth7"
