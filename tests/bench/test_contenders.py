import pytest

from swarmcore.bench.contender import Contender, contenders, place_at
from swarmcore.errors import InputError, UnknownTransportError
from swarmcore.transport import transport_class


@pytest.mark.parametrize("name", ["tcp", "webrtc:aiortc"])
def test_a_name_is_what_it_was_read_from(name):
    assert str(Contender.parse(name)) == name


@pytest.mark.parametrize("name", ["", ":", "tcp:", ":fast"])
def test_half_a_name_is_refused(name):
    with pytest.raises(InputError, match="is not of the form SCHEME or SCHEME:ENGINE"):
        Contender.parse(name)


async def test_a_transport_is_made_where_it_is_told_to_listen():
    transport = Contender("tcp").make(["127.0.0.1:0"])
    assert transport.listen_on == ("127.0.0.1:0",)
    await transport.close()


def test_an_engine_is_for_transports_that_have_several():
    with pytest.raises(InputError, match="transport tcp has no engines to choose from; leave out :fast"):
        Contender("tcp", "fast").make()
    with pytest.raises(UnknownTransportError):
        Contender("pigeon", "fast").make()


async def test_the_engine_is_handed_on(monkeypatch):
    class Engines(transport_class("tcp")):
        def __init__(self, *arguments, engine="auto", **options):
            super().__init__(*arguments, **options)
            self.engine = engine

    monkeypatch.setattr("swarmcore.bench.contender.transport_class", lambda scheme: Engines)
    for name, engine in (("tcp", "auto"), ("tcp:fast", "fast")):
        transport = Contender.parse(name).make()
        assert transport.engine == engine
        await transport.close()


def test_each_is_measured_once_and_a_place_is_for_one():
    assert contenders(["tcp", "libp2p", "tcp"]) == [Contender("tcp"), Contender("libp2p")]
    assert contenders(["tcp", "tcp"], place="127.0.0.1:0") == [Contender("tcp")]
    with pytest.raises(InputError, match="could be a place of any of"):
        contenders(["tcp", "libp2p"], place="127.0.0.1:0")
    with pytest.raises(InputError, match="nothing to measure"):
        contenders([])


def test_a_host_is_written_as_each_transport_writes_it():
    assert [place_at(scheme, "192.0.2.1") for scheme in ("webrtc", "libp2p")] == [
        "192.0.2.1:0",
        "/ip4/192.0.2.1/tcp/0",
    ]
