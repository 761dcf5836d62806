"""The page for people: in a real browser a message is answered, and what the cache holds is shown."""

import os
import urllib.request
from pathlib import Path

import pytest
from tests.browser import Browser
from tests.serve.conftest import wait_until

from narrowkv.serve.app import PAGE, page_headers


@pytest.fixture
def browser(tmp_path):
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def test_the_page_runs_its_own_script_alone(serve):
    answer = urllib.request.urlopen(serve())
    assert answer.read().decode() == PAGE and answer.headers["Content-Type"].startswith("text/html")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2 and "unsafe" not in policy
    assert page_headers(PAGE.replace("running = null", "running = 0")) != page_headers(PAGE)
    assert "http://" not in PAGE and "https://" not in PAGE and "innerHTML" not in PAGE


def test_a_message_is_answered_and_the_cache_is_shown(serve, browser, tmp_path):
    url = serve()
    browser.visit(url, 900)
    wait_until(lambda: browser.run("document.getElementById('model').textContent") == "demo")
    browser.run("document.getElementById('text').value = 'Where do <b>the ships</b> go?'")
    browser.run("document.getElementById('form').requestSubmit()")
    wait_until(
        lambda: browser.run(
            "document.querySelector('.assistant')?.textContent.length > 0 && !document.getElementById('send').disabled"
        )
    )
    assert browser.run("document.querySelector('.user').textContent") == "Where do <b>the ships</b> go?"
    assert not browser.run("document.querySelectorAll('.error, #talk b').length")
    wait_until(lambda: browser.run("document.getElementById('read').textContent") != "0")
    browser.screenshot(Path(os.environ.get("NARROWKV_SCREENSHOTS", tmp_path)) / "serve.png")
    assert not browser.trouble and all(address.startswith(url) for address in browser.requested)
