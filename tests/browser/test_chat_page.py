"""The chat page in a real browser, as a user finds it: streams, stop, keys, errors, loading, and hostile answers."""

import json
import threading
from typing import Any

import pytest
from acting import ANSWER, DONE, NAMES, Visit, ready, say
from chromium import CTRL, SHIFT, Chromium
from page_server import ATTACK, LETTERS, MANY, TOUR, Running, StandIn

RECORD = f"""(() => {{
    globalThis.seen = [];
    const look = () => {{
        if ({ANSWER} !== seen.at(-1)) seen.push({ANSWER});
        requestAnimationFrame(look);
    }};
    look();
}})()"""


def test_a_message_is_answered_in_a_stream(visit: Visit, stand_in: StandIn) -> None:
    page = ready(visit)
    page.js(RECORD)
    words = "Hello there, this is what I write. " * 8
    say(page, words, wait=False)
    page.until("document.querySelector('.stats')?.textContent.includes('tokens/s') && streams.size === 1", "tokens/s on the way")
    page.until(DONE)
    page.until(f"seen.at(-1) === {json.dumps('Hello! You wrote: ' + words.strip())}")
    lengths = [len(text) for text in page.js("seen")]
    assert len(lengths) >= 5 and lengths == sorted(lengths)
    stats = page.texts(".stats")[0]
    assert stats.startswith("60 tokens · ") and " tokens/s · first after " in stats and stats.endswith(" s")
    assert page.js("document.querySelector('.message:not(.user)').getAttribute('aria-busy')") == "false"
    assert page.js("document.title") == words[:80] + " - Octavo"
    assert stand_in.bodies == [{
        "messages": [{"role": "user", "content": words.strip()}], "stream": True, "stream_options": {"include_usage": True},
        "model": "smollm2",
    }]


def test_characters_cut_by_the_network_are_whole(visit: Visit) -> None:
    page = ready(visit)
    say(page, "utf8 please")
    assert page.js(ANSWER).strip() == LETTERS.strip()


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(visit: Visit, stand_in: StandIn, how: str) -> None:
    page = ready(visit)
    say(page, "go on forever", wait=False)
    page.until(f"{ANSWER}.length > 20")
    if how == "button":
        assert page.js("ui.send.title") == "Stop"
        page.click("#send")
    else:
        page.press("Escape")
    page.until(DONE)
    page.until(lambda: stand_in.gone == 1, "the server to see that the client has gone")
    assert page.texts(".note") == ["Stopped."]
    assert page.js("chat.messages[1].content").startswith("and on and on")
    assert page.js("ui.send.title") == "Send"
    say(page, "and now?")
    assert page.js(ANSWER) == "Hello! You wrote: and now?"
    assert [message["role"] for message in stand_in.bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_a_key_is_asked_for_and_kept_for_the_tab(visit: Visit, stand_in: StandIn) -> None:
    stand_in.key = "secret"
    page = visit()
    page.until("ui.key.open && document.activeElement.id === 'key-input'")
    page.press("Enter")
    assert "letters" in page.texts("#key-wrong")[0]
    page.type("wrong")
    page.press("Enter")
    page.until("ui['key-wrong'].textContent.includes('did not accept')")
    page.type("secret")
    page.press("Enter")
    page.until("!ui.key.open && models.length === 2")
    say(page, "Hello")
    assert page.js(ANSWER) == "Hello! You wrote: Hello"
    assert "secret" not in page.js("location.href + JSON.stringify(localStorage)")
    page.reload()
    page.until("ready && models.length === 2 && !ui.key.open")
    stand_in.key = "another"
    say(page, "Hello again", wait=False)
    page.until("ui.key.open")
    page.press("Escape")
    page.until("document.querySelector('.trouble strong')?.textContent === 'This server asks for an API key'")
    page.click(".trouble button")
    page.until("ui.key.open")
    page.type("another")
    page.press("Enter")
    page.until(f"{DONE} && !ui.key.open")
    assert page.js(ANSWER) == "Hello! You wrote: Hello again"
    assert not any("secret" in url or "another" in url for url in page.requests)


def test_nothing_that_a_model_writes_is_run(visit: Visit) -> None:
    page = ready(visit)
    say(page, "attack")
    foreign = "script, img, svg:not(.code header svg), iframe, style, [onload], [onerror], [onmouseover]"
    assert page.js("window.hacked ?? null") is None and page.texts(f".prose :is({foreign})") == []
    links = page.js("[...document.querySelectorAll('.prose a')].map((link) => [link.protocol, link.target, link.rel])")
    assert links and all(link == ["https:", "_blank", "noopener noreferrer nofollow"] for link in links)
    assert "<script>window.hacked = 1</script>" in page.js(ANSWER) and "[click](javascript:window.hacked=3)" in page.js(ANSWER)
    say(page, "<img src=x onerror='window.hacked=7'>")
    page.reload()
    page.until("ready")
    assert page.js("chat.messages[1].content") == ATTACK and page.js("window.hacked ?? null") is None
    assert page.texts(NAMES) == ["attack"]


def test_the_policy_is_in_force(visit: Visit) -> None:
    """What the page never does could not be done either."""
    page = visit()
    tried = "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'taken'; } catch (error) { return error.name; } })()"
    assert page.js(tried) == "TypeError"
    page.js("document.body.append(h('img', {src: 'https://example.org/x.png'}), h('p', {style: 'color: red'}))")
    page.until(lambda: len(page.complaints) >= 3, "the violations to be reported")
    names = ("policy", "Content Security Policy", "TrustedHTML")
    assert all(any(name in complaint for name in names) for complaint in page.complaints)
    page.complaints.clear()
    page.requests.clear()  # the picture, which was asked for and not sent for


@pytest.mark.parametrize(("words", "title", "text"), [
    ("refuse this", "The server refused this request", "The prompt has 9000 tokens, and max_model_len is 8192."),
    ("break this", "The server ended this answer", "The engine has died."),
    ("cut this", "The answer was cut off", "The connection closed before its end."),
    ("full now", "The server could not answer", "The server is full. Try again in 2 s."),
])
def test_errors_are_told_and_can_be_retried(visit: Visit, stand_in: StandIn, words: str, title: str, text: str) -> None:
    page = ready(visit)
    say(page, words)
    assert page.js("document.querySelector('.trouble p').innerText").split("\n") == [title, text]
    page.until("ready")
    page.click(".trouble button")
    page.until(lambda: len(stand_in.bodies) == 2)
    page.until(DONE)
    assert stand_in.bodies[0] == stand_in.bodies[1]
    assert len(page.texts(".message")) == 2 and page.shown(".trouble") is (words != "full now")


def test_a_server_that_is_gone_is_waited_for(visit: Visit) -> None:
    page = ready(visit)
    page.offline(True)
    say(page, "Hello")
    assert page.texts(".trouble strong") == ["The server cannot be reached"]
    page.until("!ui.state.hidden && ui.state.innerText.includes('cannot be reached')")
    page.offline(False)
    page.until("ready && ui.state.hidden")
    page.click(".trouble button")
    page.until(f"{DONE} && !document.querySelector('.trouble')")
    assert page.js(ANSWER) == "Hello! You wrote: Hello"


def test_loading_is_shown_until_the_server_is_ready(visit: Visit, stand_in: StandIn) -> None:
    stand_in.loading = [
        {"status": "loading", "phase": "fetching", "progress": 0.1}, None,
        {"status": "loading", "phase": "loading", "progress": 0.42},
        {"status": "restarting", "phase": "preparing", "progress": 0.9},
        {"status": "hanging", "phase": "ready", "progress": 1.0},
        {"status": "draining", "phase": "ready", "progress": 1.0},
    ]
    page = visit()
    page.js("""(() => {
        globalThis.states = [];
        globalThis.barred = true;
        const look = () => {
            if (ui.state.hidden) return;
            states.push(ui.state.innerText.trim());
            barred &&= ui.send.disabled;
        };
        look();
        new MutationObserver(look).observe(ui.state, {subtree: true, childList: true, attributes: true});
    })()""")
    page.js("ui.input.focus()")
    page.type("too early")
    page.press("Enter")
    page.until("ready && models.length === 2")
    wanted = ["Fetching the model, 10 %", "Loading", "Loading the model, 42 %", "The engine restarts: preparing the model, 90 %",
              "The engine does not answer", "The server is shutting down"]
    states = list(dict.fromkeys(page.js("states")))
    assert len(states) >= 4 and states == wanted[-len(states):]  # the first may have passed before the test looked
    assert page.js("barred") and stand_in.bodies == [] and not page.shown("#state")
    page.press("Enter")
    page.until(DONE)
    assert page.js(ANSWER) == "Hello! You wrote: too early"


def test_thoughts_are_folded_when_the_answer_begins(visit: Visit, stand_in: StandIn) -> None:
    page = ready(visit)
    say(page, "think hard", wait=False)
    page.until("document.querySelector('.thought')?.open && document.querySelector('.thought summary').innerText === 'Thinking'")
    page.until(DONE)
    assert not page.js("document.querySelector('.thought').open")
    assert page.texts(".thought summary")[0].startswith("Thought for ")
    assert page.texts(".thought div")[0] == page.js("chat.messages[1].reasoning") != ""
    assert page.js(ANSWER) == "Forty-two."
    page.click(".thought summary")
    assert page.js("document.querySelector('.thought').open")
    say(page, "and?")
    assert stand_in.bodies[1]["messages"][1] == {"role": "assistant", "content": "Forty-two."}


def test_keys_alone_are_enough(visit: Visit, stand_in: StandIn) -> None:
    page = ready(visit)
    focused = "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
    assert page.js(focused) == "input"
    page.type("first")
    page.press("Enter", SHIFT)
    page.type("second line")
    page.press("Enter")
    page.until(DONE)
    assert stand_in.bodies[0]["messages"][0]["content"] == "first\nsecond line"
    assert page.js(focused) == "input"
    page.press("ArrowUp")
    assert page.js("document.activeElement.value") == "first\nsecond line"
    page.press("Escape")
    assert page.js(focused) == "input" and not page.shown(".editor")
    page.press("ArrowUp")
    page.js("document.activeElement.select()")
    page.type("edited")
    page.press("Enter")
    page.until(lambda: len(stand_in.bodies) == 2)
    page.until(DONE)
    assert stand_in.bodies[1]["messages"] == [{"role": "user", "content": "edited"}]
    assert page.js("[chat.messages.length, chat.title]") == [2, "edited"]
    page.press("k", CTRL)
    assert page.shown("#empty") and page.js(focused) == "input"
    page.js("ui.new.focus()")
    order = []
    for _ in range(7):
        order.append(page.js(focused))
        assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # the focus is seen
        page.press("Tab")
    assert order == ["new", "name", "icon", "menu", "model", "theme", "tune"]


def test_answer_again_and_copy(visit: Visit, stand_in: StandIn) -> None:
    page = ready(visit)
    page.grant("clipboardReadWrite", "clipboardSanitizedWrite")
    say(page, "tour")
    page.click(".code header button")
    page.until("navigator.clipboard.readText().then((text) => text.startsWith('def blocks_needed(tokens: int, size'))")
    assert page.texts("#said") == ["Copied."]
    page.click("[title='Copy answer']")
    page.until("navigator.clipboard.readText().then((text) => text.startsWith('Here is **paged'))")
    assert page.js("navigator.clipboard.readText()") == TOUR
    page.click("[title='Answer again']")
    page.until(lambda: len(stand_in.bodies) == 2)
    page.until(DONE)
    assert stand_in.bodies[0] == stand_in.bodies[1] and len(page.texts(".message")) == 2


def test_copy_without_a_clipboard(visit: Visit) -> None:
    """Pages from another machine over http have none."""
    page = ready(visit)
    page.js("""(() => {
        Object.defineProperty(navigator, "clipboard", {value: undefined});
        document.addEventListener("copy", () => { globalThis.copied = document.activeElement.value; });
    })()""")
    say(page, "Hello")
    page.click("[title='Copy answer']")
    page.until("ui.said.textContent === 'Copied.'")
    assert page.js("copied") == "Hello! You wrote: Hello" and page.js("document.activeElement.title") == "Copy answer"


def test_a_long_answer_does_not_hold_the_page(visit: Visit) -> None:
    page = ready(visit)
    page.js("""(() => {
        globalThis.worst = 0;
        let last = performance.now();
        const look = () => {
            worst = Math.max(worst, performance.now() - last);
            last = performance.now();
            requestAnimationFrame(look);
        };
        look();
    })()""")
    say(page, "many words")
    assert page.js("chat.messages[1].content") == MANY
    assert page.js("worst") < 2000 and len(page.texts(".prose > *")) > 200


def test_a_prefix_of_a_proxy_is_kept(browser: Chromium, server: Running) -> None:
    """Under /some/where/ the page asks for /some/where/v1/..."""
    asked = threading.Event()
    app = server.server.config.loaded_app

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].startswith("/some/where/"):
            asked.set()
            scope["path"] = scope["path"].removeprefix("/some/where")
        await app(scope, receive, send)

    server.server.config.loaded_app = proxy
    page = browser.page(server.url + "some/where/")
    page.until("ready && models.length === 2")
    say(page, "Hello")
    assert page.js(ANSWER) == "Hello! You wrote: Hello" and asked.is_set() and page.complaints == []
    page.close()
