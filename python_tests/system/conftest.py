"""The browser that tests of the server's page share."""

import pytest

from support.live_page import open_browser, open_page


@pytest.fixture(scope="module")
def browser():
    with open_browser() as running:
        yield running


@pytest.fixture
def page(browser):
    with open_page(browser) as opened:
        yield opened
