"""A cluster of two nodes on this machine."""

from __future__ import annotations

import os
import warnings

import pytest

from kvpolicy import KVPolicyError
from kvpolicy.study.executors import Ray
from kvpolicy.study.results import Results

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cluster():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()


def test_ray_gives_the_same_table(study, table, tmp_path, cluster):
    spec = study.make(
        datasets=[{"use": "needle", "words": 20, "chat": False, "forced": True}],
        conditions={"budget": [{"trace": 0.3}, 40], "trigger.interval": [16]},
        samples=8,
        batch=2,
        metrics=["exact", "kl", "attention_mass"],
    )
    study.run(spec, tmp_path / "here.sqlite")
    executor = Ray(cluster.address, None)
    assert executor.slots == 2
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    study.run(spec, tmp_path / "ray.sqlite", executor=executor)
    assert table(tmp_path / "ray.sqlite") == table(tmp_path / "here.sqlite")
    with Results(tmp_path / "ray.sqlite") as results:
        assert len(results.records()) == 8 + 4 * 16


def test_a_ray_that_is_started_here_listens_on_this_machine_alone(monkeypatch):
    psutil = pytest.importorskip("psutil")
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # of a cluster that was not asked for
    here = psutil.Process()
    before = {child.pid for child in here.children(recursive=True)}
    with Ray(None, 1) as executor:
        assert executor.slots == 1
        started = [here, *(child for child in here.children(recursive=True) if child.pid not in before)]
        listening = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in started
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
    assert listening == {"127.0.0.1"}
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"^--address: 127.0.0.1:1 cannot be reached \(Connection refused\); start Ray there\.$"),
        ("somewhere", r"^--address: 'somewhere' is no address; write HOST:PORT, ray://HOST:PORT or auto\.$"),
    ],
)
def test_a_wrong_address_is_said_at_once(address, message):
    with pytest.raises(KVPolicyError, match=message):
        Ray(address, None)
