"""The page's own functions, called in the browser: the parser of events and the renderer of Markdown."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from chromium import Page
from page_server import ATTACK, TOUR

EVENTS = (
    "\ufeff: hello\r\n\r\ndata: {\"a\": \"Grüße 👩‍👩‍👧 日本語 \u2028\"}\r\n\r\n"
    "event: error\ndata: one\ndata:two\nid: 7\n\n"
    "data\r\rdata:  spaced\r\r\n\n\ndata: [DONE]\n\ndata: never ended"
)
WANTED = [
    {"event": "message", "data": "{\"a\": \"Grüße 👩‍👩‍👧 日本語 \u2028\"}"}, {"event": "error", "data": "one\ntwo"},
    {"event": "message", "data": ""}, {"event": "message", "data": " spaced"}, {"event": "message", "data": "[DONE]"},
]
PARSE = "((pieces) => {const parser = new EventParser(); return pieces.flatMap((piece) => parser.push(Uint8Array.from(piece)));})"


FUNCTIONS = """
globalThis.html = (text, open = false) => {
    const prose = new Prose();
    prose.show(text, open);
    return prose.root.innerHTML;
};
globalThis.grown = (cuts, text) => {
    const prose = new Prose();
    for (const cut of cuts) prose.show(text.slice(0, cut), true);
    prose.show(text, false);
    return prose.root.innerHTML;
};
globalThis.put = (text) => {
    const prose = new Prose();
    prose.show(text, false);
    ui.log.replaceChildren(prose.root);
};
globalThis.dear = (piece, times) => {
    const text = piece.repeat(times), begun = performance.now(), prose = new Prose();
    prose.show(text, true);
    prose.show(text, false);
    const spent = performance.now() - begun;
    let depth = 0;
    for (let node = prose.root; node; node = node.firstElementChild) depth++;
    return [spent, depth];
};
0"""


@pytest.fixture
def page(visit: Callable[..., Page]) -> Page:
    page = visit()
    page.js(FUNCTIONS)
    return page


def call(page: Page, function: str, *arguments: Any) -> Any:
    return page.js(f"({function})({', '.join(json.dumps(argument) for argument in arguments)})")


def test_events_survive_every_split(page: Page) -> None:
    raw = EVENTS.encode()
    splits = [[list(raw)], [[byte] for byte in raw]]
    splits += [[list(raw[:cut]), list(raw[cut:])] for cut in range(len(raw))]
    found = page.js(f"{json.dumps(splits)}.map({PARSE})")
    assert all(events == WANTED for events in found)


def link(href: str, words: str) -> str:
    """A link as it must come out."""
    return f'<a href="{href}" target="_blank" rel="noopener noreferrer nofollow">{words}</a>'


MARKDOWN = [
    ("plain **bold** *it* ***both*** ~~gone~~ `a*b*`",
     "<p>plain <strong>bold</strong> <em>it</em> <strong><em>both</em></strong> <del>gone</del> <code>a*b*</code></p>"),
    ("**bold *it*** and *it **bold***",
     "<p><strong>bold <em>it</em></strong> and <em>it <strong>bold</strong></em></p>"),
    ("snake_case_name 2 * 3 * 4 __init__", "<p>snake_case_name 2 * 3 * 4 <strong>init</strong></p>"),
    ("``a ` b`` ` c", "<p><code>a ` b</code> ` c</p>"),
    (r"\*no\* \(x\) \[y\]", r"<p>*no* \(x\) \[y\]</p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# Top\n### Third ##\n####### no", "<h3>Top</h3><h5>Third</h5><p>####### no</p>"),
    ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
    ("- a\n- b\n  - c\n\n    more\n- d",
     "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>more</p></li></ul></li><li><p>d</p></li></ul>"),
    ("3. a\n  - b\n4. c", '<ol start="3"><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>'),
    ("- [x] done\n- [ ] open", "<ul><li><p>☑ done</p></li><li><p>☐ open</p></li></ul>"),
    ("text\n- item\nlazy\n\nafter", "<p>text</p><ul><li><p>item<br>lazy</p></li></ul><p>after</p>"),
    ("In\n1984. It", "<p>In<br>1984. It</p>"),
    ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote><p>c</p>"),
    ("[a](https://x.org/a_(b)) [**c**](http://y.org \"t\")",
     f"<p>{link('https://x.org/a_(b)', 'a')} {link('http://y.org/', '<strong>c</strong>')}</p>"),
    ("see https://x.org/a_b, or <http://y.org>.",
     f"<p>see {link('https://x.org/a_b', 'https://x.org/a_b')}, or {link('http://y.org/', 'http://y.org')}.</p>"),
    ("![p](https://x.org/p.png)", f"<p>{link('https://x.org/p.png', 'p')}</p>"),
    ("[https://x.org](https://x.org)", f"<p>{link('https://x.org/', 'https://x.org')}</p>"),
    ("[a](javascript:alert(1)) [b](data:x) [c](/d) [d](ftp://x)",
     "<p>[a](javascript:alert(1)) [b](data:x) [c](/d) [d](ftp://x)</p>"),
    ("<b>x</b><br>y &amp; z", "<p>&lt;b&gt;x&lt;/b&gt;<br>y &amp;amp; z</p>"),
]
TABLE = "- item\n  ```js\n  if (a) {\n    b();\n\n  }\n  ```\n- a | b\n\n| x \\| y |\n|---|\n| `z` | extra |\n"
SIGNS = [
    "*", "**", "_", "`", "```", "~~", "[", "](https://x.org)", "|", "|-|-|", "\n", "\n\n", "\n- ", "\n1. ", "\n  ", "\n> ",
    "\n# ", "\n---\n", "\n```\n", "a", "b c", " ",
]
DEAR = [
    "[", "*a ", "**a ", "a* ", "`", "_a", "> ", "- ", "[a](", "!", "<", "~~", "|", "https://x.org/)", "\\", "#", " ", "*a **b ",
    "*a* ", "a\n\n", "- a\n", "| a | b |\n|---|---|\n",
]


def test_markdown(page: Page) -> None:
    for text, wanted in MARKDOWN:
        assert call(page, "html", text) == wanted
        assert call(page, "html", text.replace("\n", "\r\n")) == wanted


def test_code_and_tables(page: Page) -> None:
    call(page, "put", TOUR)
    assert page.texts("#log pre")[0].startswith("def blocks_needed(tokens: int")
    assert page.texts("#log .code span") == ["python"]
    assert page.js("[...document.querySelectorAll('#log th')].map((cell) => [cell.textContent, cell.className])") == [
        ["Method", ""], ["Waste", "right"], ["Copies", "center"]]
    assert page.texts("#log tbody tr") == ["One buffer per request60 %many", "Blocks of 164 %none"]
    assert len(page.texts("#log ol > li")) == 3
    call(page, "put", TABLE)
    assert page.texts("#log li pre") == ["if (a) {\n  b();\n\n}"] and page.texts("#log table") == ["x | yz"]


def test_a_growing_text_ends_as_the_whole_text(page: Page) -> None:
    """However a text came, and whatever was shown on the way: the end is the same."""
    rng = random.Random(5)
    for text in [TOUR, ATTACK, TABLE, *("".join(rng.choices(SIGNS, k=rng.randint(5, 60))) for _ in range(150))]:
        length = len(text.encode("utf-16-le")) // 2
        cuts = range(1, length) if length < 120 else sorted(rng.sample(range(length), 60))
        assert call(page, "grown", list(cuts), text) == call(page, "html", text), text


def test_blocks_that_are_final_keep_their_nodes(page: Page) -> None:
    """What a long answer costs is what changes in it: neither old paragraphs nor growing code are made anew."""
    kept = page.js("""(() => {
        const prose = new Prose();
        let text = "one\\n\\ntwo\\n\\nthree";
        prose.show(text, true);
        const first = prose.root.firstChild;
        prose.show(text += "\\n\\n```py\\nx", true);
        const settled = prose.root.children[1], code = prose.root.querySelector("code").firstChild;
        prose.show(text += " = 1\\ny", true);
        const same = [prose.root.children[0] === first, prose.root.children[1] === settled];
        return [...same, prose.root.querySelector("code").firstChild === code, code.data];
    })()""")
    assert kept == [True, True, True, "x = 1\ny"]


def test_an_open_mark_is_shown_as_what_it_will_be(page: Page) -> None:
    assert call(page, "html", "so **bold te", True) == "<p>so <strong>bold te</strong></p>"
    assert call(page, "html", "so **", True) == "<p>so </p>"
    assert call(page, "html", "so `co", True) == "<p>so <code>co</code></p>"
    assert call(page, "html", "so [the pa](https://exa", True) == "<p>so the pa</p>"


def test_no_text_is_dear(page: Page) -> None:
    """Half a megabyte of the worst is drawn in a moment, and its tree stays shallow."""
    for piece in DEAR:
        spent, depth = call(page, "dear", piece, 500_000 // len(piece))
        assert spent < 5000 and depth < 60, (piece, spent, depth)
