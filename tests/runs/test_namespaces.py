"""The nodes that fault tests run on: what they share, how they die, and how they fall silent."""

import subprocess
import sys

import pytest

from tests.helpers.namespaces import network, why_unavailable

LISTEN = """
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    connection.settimeout(1)
    while True:
        try:
            print(connection.recv(100).decode().strip() or "closed", flush=True)
        except TimeoutError:
            print("silence", flush=True)
        except ConnectionError:
            print("reset", flush=True)
"""
SEND = """
import socket, sys
with socket.create_connection(("node1", 5000)) as connection:
    for line in sys.stdin:
        connection.sendall(line.encode())
"""


@pytest.fixture
def two_nodes(tmp_path):
    if reason := why_unavailable():
        pytest.skip(reason)
    with network(2, tmp_path) as nodes:
        yield nodes


@pytest.fixture
def talk(two_nodes):
    """A connection from node2 to node1: (what node1 receives, where to write on node2)."""
    one, two = two_nodes
    listener = one.start([sys.executable, "-c", LISTEN], stdout=subprocess.PIPE, text=True)
    assert listener.stdout.readline() == "ready\n"
    sender = two.start([sys.executable, "-uc", SEND], stdin=subprocess.PIPE, text=True)
    send(sender.stdin, "hello")
    assert listener.stdout.readline() == "hello\n"
    yield listener.stdout, sender.stdin
    sender.stdin.close()
    listener.stdout.close()


def send(pipe, text):
    print(text, file=pipe, flush=True)


def next_of(pipe, unwanted):
    while (line := pipe.readline().strip()) == unwanted:
        pass
    return line


def test_nodes_have_their_own_name_address_and_tmp_and_share_the_folder(tmp_path, two_nodes):
    one, two = two_nodes
    look = "cat /proc/sys/kernel/hostname; getent ahostsv4 node1 | head -1; touch /tmp/mine; ls /tmp"
    assert one.run(["sh", "-c", look], check=True).stdout.split()[:2] == ["node1", "10.77.0.1"]
    (tmp_path / "shared").write_text("seen by both")
    for node in two_nodes:
        assert node.run(["cat", str(tmp_path / "shared")], check=True).stdout == "seen by both"
    assert two.run(["ls", "/tmp/mine"]).returncode != 0


def test_a_crash_ends_every_process_of_its_node_and_of_no_other(two_nodes):
    one, two = two_nodes
    survivor, victim = one.start(["sleep", "100"]), two.start(["sh", "-c", "sleep 100 & sleep 100"])
    two.crash()
    assert victim.poll() is not None and two.pids() == []
    assert survivor.poll() is None
    assert two.run(["true"]).returncode == 0


def test_a_crash_closes_connections_and_a_cut_link_does_not(two_nodes, talk):
    received, sending = talk
    _, two = two_nodes
    two.cut_link()
    send(sending, "lost?")
    assert [received.readline() for _ in range(2)] == ["silence\n"] * 2
    two.restore_link()
    assert next_of(received, "silence") == "lost?"
    two.crash()
    assert next_of(received, "silence") in ("closed", "reset")
