"""The page ``/docs`` in a real browser: it shows itself without errors, and predicts.

Not one of the unit tests, since it needs a browser. To run it:

    apt-get install chromium chromium-driver
    pip install selenium
    pytest tests/browser

With SCREENSHOT=docs/images/api-docs.png in the environment it also makes the picture in the documentation anew.
"""

import base64
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("selenium", reason="needs selenium: pip install selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
# The browser's own traffic would be seen as the page's.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--window-size=1200,900",
)


class Browser:
    """Chromium, with what the pages say in its console and what they ask for."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.set_script_timeout(SECONDS)

    def complaints(self) -> list[str]:
        """The errors in the console since the last look; violations of the page's policy are among them."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[tuple[str, str]]:
        """Method and address of each request to a server since the last look."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [(one["method"], one["url"]) for one in sent if urlsplit(one["url"]).scheme not in ("data", "blob")]

    def wait_for(self, selector: str, within: WebElement | None = None) -> WebElement:
        """The first visible element of ``selector``, once there is one."""

        def find(driver: webdriver.Chrome) -> WebElement | None:
            found = (within or driver).find_elements(By.CSS_SELECTOR, selector)
            return next((element for element in found if element.is_displayed()), None)

        return WebDriverWait(self.driver, SECONDS).until(find, f"never saw {selector}")

    def fetch(self, url: str, data: object) -> dict:
        """What a script of the page that is open gets for ``{"data": data}`` as JSON: an answer or an error's name."""
        return self.driver.execute_async_script(
            """
            const [url, data, done] = arguments;
            const headers = {"Content-Type": "application/json"};
            fetch(url, {method: "POST", headers, body: JSON.stringify({data})})
              .then(async (answer) => done({
                status: answer.status, version: answer.headers.get("X-Model-Version"), answer: await answer.json()
              }))
              .catch((error) => done({error: error.name}));
            """,
            url,
            data,
        )


class Page:
    """``/docs`` below ``url``, opened, with ``POST /predict`` ready to be tried."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        browser.complaints()
        browser.requests()
        browser.driver.get(f"{url}/docs")
        summary = browser.wait_for('.opblock-post [data-path="/predict"]')
        summary.click()
        self.operation = summary.find_element(By.XPATH, "ancestor::*[contains(@class, 'opblock-post')]")
        browser.wait_for(".try-out__btn", self.operation).click()
        browser.wait_for(".execute", self.operation)

    def choose(self, content_type: str, file: Path) -> None:
        """Have ``file`` sent as the body, or in the form, that ``content_type`` is."""
        Select(self.browser.wait_for(".body-param-content-type select", self.operation)).select_by_value(content_type)
        self.browser.wait_for("input[type=file]", self.operation).send_keys(str(file))

    def execute(self) -> object:
        """The document that the page shows as the answer."""
        self.browser.wait_for(".execute", self.operation).click()
        status = self.browser.wait_for(".live-responses-table .response .response-col_status", self.operation)
        assert status.text.split()[0] == "200"
        body = self.browser.wait_for(".live-responses-table .response .highlight-code code", self.operation)
        return json.loads(body.get_property("textContent"))

    def save_picture(self, file: Path) -> None:
        """The operation down to the end of its answer, as PNG, with its field for the body drawn smaller."""
        clip = self.browser.driver.execute_script(
            """
            const [operation] = arguments;
            const field = operation.querySelector("textarea").style;
            field.minHeight = field.height = "8em";
            const {top} = operation.getBoundingClientRect();
            const {bottom} = operation.querySelector(".live-responses-table .response").getBoundingClientRect();
            return {x: 0, y: top + scrollY, width: innerWidth, height: bottom - top, scale: 1};
            """,
            self.operation,
        )
        picture = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        content = self.browser.driver.execute_cdp_cmd("Page.captureScreenshot", picture)["data"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(content))


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@contextmanager
def serving(bundle: str, log: Path, **settings: str) -> Iterator[str]:
    """The address of a service with ``bundle``, which is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "model_server.serve", f"bundles/{bundle}", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "service"), **settings}
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SECONDS
        while not is_ready(url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(SECONDS)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/ready", timeout=SECONDS) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a small server in this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def prefixing(url: str) -> type[BaseHTTPRequestHandler]:
    """Hands on what is below ``/test/`` without this prefix, as the edge does for the idle colour; nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith("/test/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)
            upstream.request(self.command, self.path.removeprefix("/test"), body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<!DOCTYPE html><title>elsewhere</title><link rel=icon href=data:,>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def example(bundle: str, number: int = 0) -> tuple[object, object]:
    """The member "data" of one of the bundle's examples, and the member "output" of what it is answered with."""
    document = json.loads((ROOT / "bundles" / bundle / "examples.json").read_text())["examples"][number]
    return document["request"]["data"], document["response"]["output"]


def check_answer(shown: object, expected: object) -> None:
    if isinstance(expected, float):
        assert shown == {"output": pytest.approx(expected, abs=0.001)}
    else:
        assert shown["output"]["class"] == expected["class"]


def check_quiet(browser: Browser, prefix: str) -> None:
    """Nothing failed in the page, which predicted once and asked for nothing but what is below ``prefix``."""
    assert browser.complaints() == []
    requests = browser.requests()
    assert [url for _, url in requests if not url.startswith(f"{prefix}/")] == []
    assert requests.count(("POST", f"{prefix}/predict")) == 1


@pytest.mark.parametrize("bundle", ["simplemodel/1.0.0", "digits/1.0.0"])
def test_the_page_predicts_the_example(browser, tmp_path, bundle):
    with serving(bundle, tmp_path / "log") as url:
        page = Page(browser, url)
        check_answer(page.execute(), example(bundle)[1])
        check_quiet(browser, url)
        if bundle.startswith("digits") and "SCREENSHOT" in os.environ:
            page.save_picture(Path(os.environ["SCREENSHOT"]))


@pytest.mark.parametrize("content_type", ["application/octet-stream", "multipart/form-data"])
def test_the_page_predicts_an_image_file(browser, tmp_path, content_type):
    bundle = "digits/1.0.0"
    data, expected = example(bundle, 5)
    (tmp_path / "digit.png").write_bytes(base64.b64decode(data))
    with serving(bundle, tmp_path / "log") as url:
        page = Page(browser, url)
        page.choose(content_type, tmp_path / "digit.png")
        check_answer(page.execute(), expected)
        check_quiet(browser, url)


def test_the_page_stays_under_its_prefix(browser, tmp_path):
    bundle = "digits/1.0.0"
    with serving(bundle, tmp_path / "log") as url, listening(prefixing(url)) as edge:
        page = Page(browser, f"{edge}/test")
        check_answer(page.execute(), example(bundle)[1])
        check_quiet(browser, f"{edge}/test")


def test_links_to_an_operation_open_it(browser, tmp_path):
    with serving("digits/1.0.0", tmp_path / "log") as url:
        Page(browser, url)
        link = browser.driver.current_url
        assert link != f"{url}/docs"
        browser.driver.get("about:blank")
        browser.driver.get(link)
        browser.wait_for('.opblock.is-open [data-path="/predict"]')
        assert browser.complaints() == []


def test_pages_of_an_origin_that_is_allowed_may_predict(browser, tmp_path):
    bundle = "simplemodel/1.0.0"
    data, expected = example(bundle)
    with listening(EmptyPage) as elsewhere, serving(bundle, tmp_path / "log", MODEL_CORS_ORIGINS=elsewhere) as url:
        browser.driver.get(elsewhere)
        found = browser.fetch(f"{url}/predict", data)
        assert (found["status"], found["version"]) == (200, "1.0.0")
        check_answer(found["answer"], expected)


def test_pages_of_other_origins_may_not_predict(browser, tmp_path):
    bundle = "simplemodel/1.0.0"
    with listening(EmptyPage) as elsewhere, serving(bundle, tmp_path / "log") as url:
        browser.driver.get(elsewhere)
        browser.complaints()
        assert browser.fetch(f"{url}/predict", example(bundle)[0]) == {"error": "TypeError"}
        assert "blocked by CORS policy" in browser.complaints()[0]
