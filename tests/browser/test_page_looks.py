"""How the page looks and moves: scrolling, themes, contrast, motion, a phone."""

import pytest
from acting import ANSWER, NAMES, Visit, ready, say

GROUND = "getComputedStyle(document.body).backgroundColor"
CONTRAST = """((pairs) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const light = (name) => {
        canvas.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--" + name);
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((part) => linear(part / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return pairs.map((pair) => {
        const [a, b] = pair.map(light);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
})"""
PAIRS = [["ink", "bg"], ["ink", "side"], ["ink", "fill"], ["soft", "bg"], ["soft", "side"], ["soft", "fill"], ["accent", "bg"],
         ["on-accent", "accent"], ["bad", "bg"], ["edge", "bg"]]
SMALL_BUTTONS = """[...document.querySelectorAll("button")].filter((node) => node.checkVisibility()).filter((node) => {
    const {width, height} = node.getBoundingClientRect();
    return width < 32 || height < 32;
}).map((node) => node.title || node.textContent)"""


def test_the_view_follows_until_the_reader_scrolls(visit: Visit) -> None:
    page = ready(visit, height=500)
    say(page, "tour")
    say(page, "go on forever", wait=False)
    end = "(ui.view.scrollHeight - ui.view.scrollTop - ui.view.clientHeight < 2)"
    page.until(f"{ANSWER}.length > 400 && {end}")
    page.wheel("#view", -300)
    page.until(f"!{end} && !ui.down.hidden")
    place, length = page.js(f"[ui.view.scrollTop, {ANSWER}.length]")
    page.until(f"{ANSWER}.length > {length + 200}")
    assert page.js("ui.view.scrollTop") <= place + 1  # the wheel may still have been turning
    page.click("#down")
    page.until(f"{end} && ui.down.hidden")
    length = page.js(f"{ANSWER}.length")
    page.until(f"{ANSWER}.length > {length + 200} && {end}")


def test_themes(visit: Visit) -> None:
    page = ready(visit, dark=True)
    dark = page.js(GROUND)
    page.media(dark=False)
    page.until(f"{GROUND} !== '{dark}'")
    page.click("#theme")
    assert page.js(GROUND) == dark
    page.reload()
    page.until("ready")
    assert page.js(GROUND) == dark
    page.click("#tune")
    page.js("ui.look.value = 'system'; ui.look.dispatchEvent(new Event('change'))")
    assert page.js(GROUND) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(visit: Visit, dark: bool) -> None:
    """WCAG AA: 4.5 for text, 3 for the borders of controls."""
    page = visit(dark=dark)
    for pair, ratio in zip(PAIRS, page.js(f"{CONTRAST}({PAIRS})"), strict=True):
        assert ratio >= (3.0 if pair[0] == "edge" else 4.5), (pair, ratio)


def test_little_motion_is_none(visit: Visit) -> None:
    page = ready(visit)
    say(page, "hold on for a while", wait=False)
    page.until("document.querySelector('#chats li.live')")
    assert page.js("document.getAnimations().length") > 0
    page.media(calm=True)
    page.until("document.getAnimations().length === 0")


@pytest.mark.parametrize("width", [320, 360])
def test_a_phone(visit: Visit, width: int) -> None:
    page = ready(visit, width=width, height=740, phone=True)
    fits = "document.documentElement.scrollWidth <= innerWidth && ui.view.scrollWidth <= ui.view.clientWidth"
    assert page.js(fits) and page.js("document.activeElement.id") != "input"  # or the keyboard would cover the page
    say(page, "tour " + "w" * 300)
    say(page, "attack")
    assert page.js(fits)
    assert page.js("document.querySelector('.code pre').scrollWidth > document.querySelector('.code pre').clientWidth")
    assert page.js(SMALL_BUTTONS) == []
    sizes = page.js("[ui.input, ui.seed].map((node) => parseFloat(getComputedStyle(node).fontSize))")
    assert min(sizes) >= 16  # a smaller one makes phones zoom
    page.click("#menu")
    page.until("getComputedStyle(ui.side).visibility === 'visible' && ui.side.getBoundingClientRect().left === 0")
    assert page.js("document.querySelector('main').inert")
    page.press("Escape")
    page.until("getComputedStyle(ui.side).visibility === 'hidden'")
    page.click("#tune")
    assert page.js("ui.settings.scrollWidth <= innerWidth && ui.settings.getBoundingClientRect().width <= innerWidth")
    page.click("#settings [data-close]")
    page.click("#menu")
    page.until("ui.side.getBoundingClientRect().left === 0")
    page.click(NAMES)
    page.until("getComputedStyle(ui.side).visibility === 'hidden'")
    assert not page.js("document.querySelector('main').inert")
