"""What the page keeps: chats, settings, and what it does where a browser keeps nothing."""

from acting import ANSWER, KEPT, NAMES, Visit, ready, say
from page_server import StandIn

CATCH_EXPORT = """(() => {
    globalThis.saved = [];
    URL.createObjectURL = (blob) => { blob.text().then((text) => saved.push(JSON.parse(text))); return "#"; };
})()"""


def test_settings_reach_the_server_and_stay(visit: Visit, stand_in: StandIn) -> None:
    page = ready(visit)
    page.click("#tune")
    assert page.js("document.activeElement.closest('dialog')?.id") == "settings"
    for name, text in (("system", "Be brief."), ("temperature", "0.3"), ("top_p", "0.9"), ("max_tokens", "64"), ("seed", "7")):
        page.js(f"ui.{name}.focus()")
        page.type(text)
    page.js("ui.seed.focus(); ui.seed.select()")
    page.type("1.5")
    assert page.js("ui.seed.getAttribute('aria-invalid')") == "true"  # and the last good value counts
    page.press("Escape")
    page.js("ui.model.value = 'other'; ui.model.dispatchEvent(new Event('change'))")
    page.reload()
    page.until("ready && models.length === 2")
    say(page, "long story")
    assert page.texts(".note") == ["The answer reached its limit of tokens."]
    body = stand_in.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed", "model")} == {
        "temperature": 0.3, "top_p": 0.9, "max_tokens": 64, "seed": 7, "model": "other"}
    page.click("#tune")
    page.js("ui.seed.focus(); ui.seed.select()")
    page.press("Backspace")
    page.press("Escape")
    say(page, "once more")
    assert "seed" not in stand_in.bodies[1]


def test_chats_are_kept_deleted_brought_back_and_exported(visit: Visit) -> None:
    page = ready(visit)
    say(page, "one")
    page.click("#new")
    say(page, "two")
    assert page.texts(NAMES) == ["two", "one"]
    page.reload()
    page.until("ready && models.length")
    assert page.texts(NAMES) == ["two", "one"] and page.js(ANSWER) == "Hello! You wrote: two"
    page.click("#chats li:last-child .name")
    assert page.js(ANSWER) == "Hello! You wrote: one" and page.texts("[aria-current=page]") == ["one"]
    page.js(CATCH_EXPORT)
    page.click("#export")
    page.until("saved.length === 1")
    assert page.js("[saved[0].title, saved[0].messages.map(({role, content}) => [role, content])]") == [
        "one", [["user", "one"], ["assistant", "Hello! You wrote: one"]]]
    page.click("#chats li.open .icon")
    assert page.texts(NAMES) == ["two"] and page.shown("#empty") and page.js(KEPT) == 1
    page.click("#toast button")
    assert page.texts(NAMES) == ["two", "one"] and not page.shown("#toast")
    page.click("#chats li:last-child .name")
    assert page.js(ANSWER) == "Hello! You wrote: one"
    page.click("#tune")
    page.click("#export-all")
    page.until("saved.length === 2")
    assert page.js("saved[1].map(({title}) => title)") == ["two", "one"]
    page.click("#delete-all")
    assert page.texts(NAMES) == [] and page.js(KEPT) == 0


def test_an_answer_goes_on_while_another_chat_is_shown(visit: Visit, stand_in: StandIn) -> None:
    page = ready(visit)
    words = "hold the line, please, for quite a while"
    say(page, words, wait=False)
    page.until(f"{ANSWER}.length > 10")
    page.click("#new")
    assert page.shown("#empty") and page.js("ui.send.title") == "Send" and page.texts("#chats li.live") == [words]
    say(page, "meanwhile", wait=False)
    page.until("streams.size === 1 && chat.messages.length === 2")
    stand_in.hold.set()
    page.until("streams.size === 0 && !document.querySelector('#chats li.live')")
    page.click("#chats li:not(.open) .name")
    assert page.js(ANSWER) == "Hello! You wrote: " + words


def test_a_chat_deleted_while_it_is_answered_stays_deleted(visit: Visit, stand_in: StandIn) -> None:
    page = ready(visit)
    say(page, "go on forever", wait=False)
    page.until(f"{ANSWER}.length > 20")
    page.click("#chats li.open .icon")
    page.until("streams.size === 0")
    page.until(lambda: stand_in.gone == 1, "the server to see that the client has gone")
    assert page.texts(NAMES) == [] and page.js(KEPT) == 0


def test_what_has_come_before_the_tab_is_left_is_kept(visit: Visit) -> None:
    page = ready(visit)
    say(page, "go on forever", wait=False)
    page.until(f"{ANSWER}.length > 20")
    page.reload()
    page.until("ready && models.length")
    assert page.js(ANSWER).startswith("and on and on") and page.texts(".note") == ["Stopped."]


def test_a_full_storage_is_no_end(visit: Visit) -> None:
    page = ready(visit)
    page.js("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; 0")
    say(page, "Hello")
    assert "keeps no more" in page.js("ui.toast.innerText")
    page.click("#new")
    page.click(NAMES)
    assert page.js(ANSWER) == "Hello! You wrote: Hello"


def test_a_broken_storage_is_passed_over(visit: Visit) -> None:
    page = ready(visit)
    page.js("""(() => {
        localStorage.setItem("octavo.chats", '[{"id": "x", "title": "lost"}, 3, null]');
        localStorage.setItem("octavo.settings", "{");
        sessionStorage.setItem("octavo.open", '"x"');
    })()""")
    page.reload()
    page.until("ready && models.length")
    page.click(NAMES)
    assert page.shown("#empty")
