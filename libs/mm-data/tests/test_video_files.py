"""A path is a path: only that file is opened, whatever its name or its content says to FFmpeg."""

import os
import socket
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from mm_data import probe, read_video

sys.path.insert(0, str(Path(__file__).parent))
from barcode_clips import read_barcode, write_clip


@pytest.fixture
def listener():
    """A server that answers nobody and counts who came: `listener.port`, `listener.came`."""

    class Listener:
        came = 0

    with socket.create_server(("127.0.0.1", 0)) as server:
        Listener.port = server.getsockname()[1]

        def count() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                Listener.came += 1
                connection.close()

        thread = threading.Thread(target=count)
        thread.start()
        yield Listener
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


PLAYLISTS = {
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{url}\n#EXT-X-ENDLIST\n",
    "variant.m3u8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}\n",
    "concat.ffconcat": "ffconcat version 1.0\nfile '{url}'\n",
    "dash.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT2S" minBufferTime="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" width="80" height="48" '
    'codecs="avc1.42c00d"><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\na=control:{url}\n"
    "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "list.asx": '<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
    "reference.mov": "rtsptextRTSP://{url}\r",
}


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("disguise", [None, "a.mp4"])
def test_a_playlist_opens_nothing(tmp_path, listener, monkeypatch, name, disguise):
    """Neither the net nor the video that lies beside it, which all of these name."""
    monkeypatch.chdir(tmp_path)
    secret = write_clip(tmp_path / "secret.mp4", 5)
    write_clip(tmp_path / "secret.ts", 5)
    for url in (f"http://127.0.0.1:{listener.port}/a.mp4", secret.name, f"file:{secret}", "secret.ts", "fd:", "pipe:0"):
        path = tmp_path / (disguise or name)
        path.write_text(PLAYLISTS[name].format(url=url))
        for given in (path, Path(path.name)):
            with pytest.raises(ValueError, match=path.name):
                probe(given)
    assert listener.came == 0


def test_a_name_means_nothing_to_ffmpeg(tmp_path, listener, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "one.mp4", 5)
    write_clip(tmp_path / "per001.mp4", 3)
    names = ["-", "pipe:", "pipe:0", "fd:", "cache:one.mp4", "data:video;base64,AAAA", "async:one.mp4", "file:one.mp4"]
    names += [f"http://127.0.0.1:{listener.port}/a.mp4", f"tcp://127.0.0.1:{listener.port}", "concat:one.mp4|one.mp4"]
    names += ["subfile,,start,0,end,0,,:one.mp4", "crypto:one.mp4", "lavfi:testsrc", "per%03d.mp4", "*.mp4"]
    for name in names:
        with pytest.raises(ValueError, match="is not there"):
            probe(name)
        if "/" not in name:  # and it is what it holds where there is such a file
            write_clip(tmp_path / "written.mp4", 7).rename(name)
            assert read_barcode(read_video(name, [6]).frames[0]) == 6
    assert listener.came == 0


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.mp4"))
        for path, kind in ((tmp_path / "pipe.mp4", "a named pipe"), (tmp_path / "socket.mp4", "a socket")):
            with pytest.raises(ValueError, match=f"{path.name} is {kind}"):
                probe(path)
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        probe("/dev/zero")


def test_a_large_file_needs_little_memory(tmp_path):
    """Its packets are read one at a time."""
    path = tmp_path / "large.mov"
    frame = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=8)
        stream.height, stream.width, stream.pix_fmt = 512, 512, "rgb24"
        for number in range(80):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
    assert path.stat().st_size > 60e6
    probe(path)  # what is loaded once
    assert _growth(lambda: probe(path)) < 10e6


def _growth(work) -> float:
    """How many bytes more the process needs at its largest, a while at least, than before."""
    peak, done = 0, threading.Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    before = resident()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peak - before
