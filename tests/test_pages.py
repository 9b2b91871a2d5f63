"""The pages as a person has them: in a real browser, from a prompt to a video, a question, and runs side by side."""

from __future__ import annotations

import http.client
import json
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from mm_convert import save_checkpoint
from mm_data import made_with, write_video
from mm_infer.__main__ import main
from mm_models import build, preset
from mm_models.families import find
from mm_models.qwen2_5_vl.testing import tiny_config, write_hub_folder
from mm_models.wan.testing import write_encoders
from mm_train.page.runs import Runs
from mm_train.page.server import open_server

PATIENCE = 60_000  # milliseconds, of a busy machine
MODEL = "wan-tiny-vace"
SECRET = "nobody is to read this"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no browser here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A tab. Whatever it asks of another host, or complains of, fails the test."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    ours = ("http://127.0.0.1:", "data:", "blob:")
    tab.on("request", lambda asked: None if asked.url.startswith(ours) else wrong.append(asked.url))
    tab.on("pageerror", lambda error: wrong.append(f"{error} {error.stack}"))
    tab.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield tab
    tab.close()
    assert not wrong


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """W/, hub/, a.png, v.mp4, and secret.txt."""
    place = tmp_path_factory.mktemp("pages")
    write_encoders(place / "W", text_dim=64)
    save_checkpoint(place / "W/transformer", build(MODEL).state_dict(), find(MODEL)[0].describe(preset(MODEL)))
    write_hub_folder(place / "hub", tiny_config(merges=110), seed=3)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (64, 96, 3), np.uint8)).save(place / "a.png")
    write_video(place / "v.mp4", random.integers(0, 256, (9, 64, 96, 3), np.uint8), fps=16)
    (place / "secret.txt").write_text(SECRET, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """serve(flags of mm_infer.page) -> the address of the page."""
    import uvicorn

    from mm_infer.page.__main__ import prepare

    with ExitStack() as held:

        def start(*argv: str) -> str:
            app, listening = prepare([*argv, "--port", "0"], held)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            held.callback(thread.join)
            held.callback(setattr, server, "force_exit", True)
            held.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start


@pytest.fixture(scope="module")
def studio(place, serve) -> str:
    """A page of the tiny model, whose folder holds a link to what is nobody's business."""
    (place / "out").mkdir()
    (place / "out/leak.mp4").symlink_to(place / "v.mp4")
    small = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "40"]
    return serve("--weights", str(place / "W"), "--output", str(place / "out"), *small)


def fetch(address: str, path: str, method: str = "GET", body: str | None = None, **headers: str) -> tuple[int, bytes]:
    """As it is written: nothing in the path is put right before it is sent."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    said = answer.status, answer.read()
    connection.close()
    return said


def test_from_a_prompt_to_a_video_and_to_another_beside_it(page, studio, place):
    """Every value is filled in; progress is seen; the command that is shown makes the same file."""
    page.goto(studio)
    page.locator("#prompt textarea").fill("")
    page.locator("#go").click()
    assert page.get_by_role("alert").inner_text() == "the prompt is empty: say what to show"
    assert page.locator("#option-guidance input, #option-guidance textarea").input_value() == "5"
    page.locator("#prompt textarea").fill("a cat, 'walking'")
    page.locator("#input-references input[type=file]").set_input_files([place / "a.png"])
    page.locator("#input-video input[type=file]").set_input_files(place / "v.mp4")
    page.locator("#input-references .file-preview").wait_for()
    page.locator("#input-video video").wait_for()
    page.locator("#go").click()
    page.locator("#status").get_by_text("of 40").first.wait_for()  # step 3 of 40
    page.locator("#result-video video").wait_for()
    first = place / "out/video_0.mp4"
    assert made_with(first)["steps"] == 40
    page.wait_for_function("() => document.querySelector('#result-video video').videoWidth === 48")

    command = page.locator("#result-command textarea").input_value()
    program, dash, module, *flags = shlex.split(command.replace("\\\n", " "))
    assert (program, dash, module) == ("python", "-m", "mm_infer")
    main(flags)
    again = place / "out/again/video_0/video_0.mp4"
    assert again.read_bytes() == first.read_bytes()

    for wrong, said in (("33", "a multiple of 16"), ("many", "height is many; it takes a whole number")):
        page.locator("#option-height input, #option-height textarea").fill(wrong)
        page.locator("#go").click()
        page.get_by_role("alert").get_by_text(said).wait_for()
    page.locator("#option-height input, #option-height textarea").fill("32")
    page.locator("#option-steps input, #option-steps textarea").fill("2")
    page.locator("#option-seed input, #option-seed textarea").fill("7")
    page.locator("#go").click()
    page.locator("#status").get_by_text("Made video_1.mp4").wait_for()

    page.get_by_role("tab", name="Made").click()
    page.locator(".mm-card").nth(1).click()  # the older one
    page.locator("#shown-command textarea").wait_for()
    assert page.locator("#shown-command textarea").input_value() == command
    page.get_by_role("tab", name="Compare").click()
    page.locator("#difference table").wait_for()
    rows = page.locator("#difference tr").all_inner_texts()
    assert [row.split() for row in rows[1:]] == [["steps", "40", "2"], ["seed", "0", "7"]]
    assert page.locator("#film-A video, #film-B video").count() == 2

    page.get_by_role("tab", name="Made").click()
    page.locator("#reuse").click()
    page.locator("#input-video video").wait_for()
    assert page.locator("#option-steps input, #option-steps textarea").input_value() == "40"

    page.locator("#option-steps input, #option-steps textarea").fill("1000")
    page.locator("#go").click()
    page.locator("#status").get_by_text("of 1000").first.wait_for()
    page.locator("#stop").click()
    page.locator("#status").get_by_text("Stopped.").wait_for()
    assert not (place / "out/video_2.mp4").exists()


def test_videos_stay_when_the_page_is_started_again(page, place, serve):
    folder = place / "later"
    folder.mkdir()
    record = {"prompt": "<b>bold</b>", "mm_infer": "0", "weights": "W", "seed": 1}
    write_video(folder / "video_0.mp4", np.zeros((1, 32, 48, 3), np.uint8), 16, record)
    page.goto(serve("--weights", str(place / "W"), "--output", str(folder)))
    page.get_by_role("tab", name="Made").click()
    assert page.locator(".mm-card span").first.inner_text() == "<b>bold</b>"
    page.locator(".mm-card").click()
    page.locator("#shown-command textarea").wait_for()
    assert "--prompt '<b>bold</b>'" in page.locator("#shown-command textarea").input_value()


def test_nothing_is_served_that_was_not_named(studio, place):
    outside, inside = str(place / "secret.txt"), "/made/leak.mp4"
    assert fetch(studio, "/")[0] == 200
    paths = [inside, "/made/..%2fsecret.txt", "/made/../secret.txt", "/made/%2e%2e/secret.txt", f"/made/{outside}"]
    paths += [f"/gradio_api/file={outside}", f"/gradio_api/file={place}/out/../secret.txt", f"/file={outside}"]
    paths += [f"/gradio_api/file={place}/out/leak.mp4", f"/gradio_api/file={place}/out/video_0.mp4"]
    paths += [
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/static/..%2f..%2fsecret",
    ]
    paths += ["/gradio_api/file=/etc/passwd", "/docs", "/openapi.json", "/made/.hidden.mp4"]
    for path in paths:
        status, body = fetch(studio, path)
        assert status in (403, 404), path
        assert SECRET.encode() not in body
    assert fetch(studio, "/", Host="evil.example")[0] == 400  # a name that was made to mean 127.0.0.1
    config = json.loads(fetch(studio, "/config")[1])
    going = next(one for one in config["dependencies"] if len(one["inputs"]) > 8)
    names = {part["id"]: part["type"] for part in config["components"]}
    data = [
        {"path": outside, "meta": {"_type": "gradio.FileData"}} if names[part] in ("video", "file", "image") else "32"
        for part in going["inputs"]
    ]
    body = json.dumps({"fn_index": going["id"], "data": data, "session_hash": "s"})
    status, said = fetch(studio, "/gradio_api/run/predict", "POST", body, **{"Content-Type": "application/json"})
    assert status >= 400
    assert SECRET.encode() not in said
    assert not list((place / "out").glob("inputs/secret*"))


def test_a_conversation_with_a_picture(page, serve, place):
    page.goto(serve("--weights", str(place / "hub"), "--max_new_tokens", "8"))
    page.locator("#question input[type=file]").set_input_files(place / "a.png")
    page.locator("#question img").wait_for()
    page.locator("#question textarea").fill("What is this?")
    page.keyboard.press("Enter")
    page.locator("#chat [data-testid=bot]").first.wait_for()
    page.locator("#chat img").first.wait_for()
    page.locator("#question textarea").fill("And now?")
    page.keyboard.press("Enter")
    page.locator("#chat [data-testid=bot]").nth(1).wait_for()
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"}
    page.locator("#question input[type=file]").set_input_files(broken)
    page.locator("#question .thumbnail-item").wait_for()
    page.locator("#question textarea").fill("And this?")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("broken.png").wait_for()
    assert page.locator("#question textarea").input_value() == "And this?"
    assert page.locator("#chat [data-testid=user]").count() == 3  # a picture and two questions
    page.locator("#new").click()
    page.locator("#chat [data-testid=bot]").first.wait_for(state="detached")


def write_run(folder: Path, steps: range, lr: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 1 / step, "lr": lr, "seconds": 0.5}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "validation_loss": 2 / step}) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs, one that is empty and one that is broken."""
    runs = tmp_path_factory.mktemp("runs")
    for name, lr in (("one", 1e-4), ("two", 2e-4)):
        write_run(runs / name, range(1, 31), lr)
        saved = runs / name / "checkpoints/step-00000020"
        saved.mkdir(parents=True)
        (saved / "progress.json").write_text("{}", encoding="utf-8")
        (saved.parent / "latest").write_text(saved.name, encoding="utf-8")
        (saved / "config.toml").write_text(f'model = "m"\n[optim]\nlr = {lr}\n', encoding="utf-8")
        for step in (10, 20):
            for number, prompt in enumerate(("a cat", "a <i>dog</i>")):
                file = runs / name / f"samples/step-{step:08d}/{number:03d}.mp4"
                file.parent.mkdir(parents=True, exist_ok=True)
                write_video(file, np.full((3, 32, 48, 3), step, np.uint8), 8, {"prompt": prompt, "step": step})
    memory = [{"parameters": 2**30, "moments": 2**31}]
    measured = {"parameters": 2**30, "moments": 2**31, "memory": 2**32, "seconds": 0.5}
    said = {"estimate": {"peak": 2**33, "memory": memory}, "measured": measured}
    (runs / "one/estimate.json").write_text(json.dumps(said), encoding="utf-8")
    (runs / "empty/checkpoints").mkdir(parents=True)
    (runs / "broken").mkdir()
    (runs / "broken/metrics.jsonl").write_text('{"step": 1, "loss": 2}\nrubbish\n', encoding="utf-8")
    return runs


@pytest.fixture(scope="module")
def watched(runs) -> Iterator[str]:
    server = open_server(Runs([runs]), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_runs_over_one_another_while_they_grow(page, watched, runs):
    page.goto(watched)
    figures = page.locator("#charts figure")
    figures.nth(3).wait_for()
    assert figures.evaluate_all("all => all.map(one => one.dataset.metric)") == [
        "loss",
        "validation_loss",
        "lr",
        "seconds",
    ]
    listed = page.locator("#runs")
    assert "1 of 2 lines cannot be read, first line 2" in listed.inner_text()
    assert "no step yet" in listed.inner_text()
    assert page.locator("[data-metric=validation_loss] path").count() == 2
    write_run(runs / "two", range(31, 51), 2e-4)
    listed.get_by_text("step 50").wait_for()
    page.locator("#smooth").fill("0.5")
    page.locator("[data-metric=loss] path.pale").nth(2).wait_for(state="attached")
    page.get_by_label("log scale").check()
    page.get_by_label("broken").uncheck()

    page.get_by_role("tab", name="Samples").click()
    page.locator("#made video").nth(3).wait_for()
    assert page.locator("#made h2").all_inner_texts() == ["a cat", "a <i>dog</i>"]
    assert page.locator("#at").inner_text() == "20"
    page.locator("#step").fill("0")
    page.locator("#made").get_by_text("one, step 10").first.wait_for()
    page.locator("#made video[src*='step=20']").first.wait_for(state="detached")
    assert page.locator("#made video[src*='step=10']").count() == 4

    page.get_by_role("tab", name="Settings").click()
    page.locator("#config tr.differs").wait_for()
    assert page.locator("#config tr.differs").all_inner_texts()[0].split() == ["optim.lr", "—", "0.0001", "0.0002"]
    page.get_by_role("tab", name="Estimate").click()
    page.locator("#estimates").get_by_text("8 GiB").wait_for()


def test_runs_serve_their_own_files_alone(watched, runs):
    (runs / "one/samples/step-00000010/002.mp4").symlink_to(runs / "broken/metrics.jsonl")
    video = "/video?run=one&step=10&file="
    assert fetch(watched, f"{video}000.mp4") == (200, (runs / "one/samples/step-00000010/000.mp4").read_bytes())
    assert fetch(watched, f"{video}000.mp4", Range="bytes=4-7") == (206, b"ftyp")
    for file in ("002.mp4", "..%2f..%2fmetrics.jsonl", "/etc/passwd", "000.mp4%00", ""):
        assert fetch(watched, video + file)[0] == 404
    for path in (
        "/metrics.jsonl",
        "/../one/metrics.jsonl",
        "/video",
        "/curve?run=../broken&metric=loss",
        "/samples?run=x",
    ):
        assert fetch(watched, path)[0] == 404
    assert fetch(watched, "/runs", Host="evil.example")[0] == 403
    assert fetch(watched, "/", "POST", "x")[0] == 501
