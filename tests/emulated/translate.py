"""Turns a CUDA source into C++ for the machine: what a host compiler does not take is rewritten, all else stays as it is.

Owns the table of PTX forms. Three things are rewritten: inline PTX becomes a call of ptx.h, `__shared__` becomes a place in the
block's shared memory, and a kernel says its name when it begins. Line numbers stay, so that an error of the compiler names the
source's own line. Invariant: PTX that is not in the table is an error where it is compiled for 8.0, and nothing elsewhere.
"""

import re

# A form is the instruction with single blanks behind commas. {0} is operand 0.
MULTIPLY = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{}.{}.f32 {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};")
MULTIPLY_CALL = "emulated::multiply<{}>({{0}}, {{1}}, {{2}}, {{3}}, {{4}}, {{5}}, {{6}}, {{7}}, {{8}}, {{9}})"
MATRICES = "ldmatrix.sync.aligned.m8n8.x4"
COPY = "cp.async.cg.shared.global"
FORMS = {
    "ex2.approx.ftz.f32 %0, %1;": "{0} = emulated::power_of_two({1})",
    "rcp.approx.ftz.f32 %0, %1;": "{0} = emulated::reciprocal({1})",
    "ld.global.u32 %0, [%1];": "emulated::load_global({1}, {0})",
    "ld.global.v2.u32 {%0, %1}, [%2];": "emulated::load_global({2}, {0}, {1})",
    "ld.global.v4.u32 {%0, %1, %2, %3}, [%4];": "emulated::load_global({4}, {0}, {1}, {2}, {3})",
    "ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];": "emulated::load_shared({4}, {0}, {1}, {2}, {3})",
    "st.shared.b32 [%0], %1;": "emulated::store_shared({0}, {1})",
    "atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;": "{0} = emulated::add_global({1}, {2})",
    "bar.sync 1, %0;": "emulated::barrier(1, {0})",
    MULTIPLY.format("bf16", "bf16"): MULTIPLY_CALL.format("__nv_bfloat16"),
    MULTIPLY.format("f16", "f16"): MULTIPLY_CALL.format("__half"),
    f"{MATRICES}.shared.b16 {{%0, %1, %2, %3}}, [%4];": "emulated::load_matrices<false>({0}, {1}, {2}, {3}, {4})",
    f"{MATRICES}.trans.shared.b16 {{%0, %1, %2, %3}}, [%4];": "emulated::load_matrices<true>({0}, {1}, {2}, {3}, {4})",
    "movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;": "{0} = emulated::transpose_matrix({1})",
    "cvt.rn.bf16x2.f32 %0, %1, %2;": "{0} = emulated::pack<__nv_bfloat16>({1}, {2})",
    "cvt.rn.f16x2.f32 %0, %1, %2;": "{0} = emulated::pack<__half>({1}, {2})",
    f"{COPY} [%0], [%1], 16, %2;": "emulated::copy_begin({0}, {1}, 16, {2})",
    f"{COPY}.L2::128B [%0], [%1], 16, %2;": "emulated::copy_begin({0}, {1}, 16, {2})",
    f"{COPY}.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;": "emulated::copy_begin({0}, {1}, 16, {2})",
    "createpolicy.fractional.L2::evict_first.b64 %0, 1.0;": "{0} = 0",
    "cp.async.commit_group;": "emulated::copies_commit()",
    "cp.async.wait_group %0;": "emulated::copies_wait({0})",
    "cp.async.wait_all;": "emulated::copies_wait(0)",
}
ASM = re.compile(r"\basm\b(?:\s+volatile)?\s*\(")
STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
OPERAND = re.compile(r'\s*,?\s*"[^"]*"\s*\(')
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];")
STATIC = re.compile(r"(?<!extern )__shared__ (?:__align__\(\d+\) )?((?:unsigned |long )*[\w:]+(?:<[^;]*?>)?) ([^;]+);")
GLOBAL = re.compile(r"__global__\s+void\b")


def translate(text: str, name: str) -> str:
    """The text of csrc/<name> for a host compiler."""
    text = _replace_asm(text, name)
    text = DYNAMIC.sub(lambda m: f"{m[1]}* const {m[2]} = reinterpret_cast<{m[1]}*>(emulated::shared_dynamic());", text)
    text = STATIC.sub(lambda m: " ".join(_shared(m[1], each, _place(name, text, m.start())) for each in _split(m[2])), text)
    return f'#line 1 "{name}"\n{_name_kernels(text)}'


def _replace_asm(text: str, name: str) -> str:
    found, at = [], 0
    while match := ASM.search(text, at):
        end = _closing(text, match.end())
        statement = text[match.start() : end]
        call = _call(text[match.end() : end - 1], _place(name, text, match.start()))
        found += [text[at : match.start()], call, "\n" * statement.count("\n")]
        at = end
    return "".join([*found, text[at:]])


def _place(name: str, text: str, at: int) -> str:
    line = text.count("\n", 0, at) + 1
    return f"{name}:{line}"


def _call(inside: str, place: str) -> str:
    """The C++ for one asm statement, without its semicolon."""
    code, at = "", 0
    while match := STRING.match(inside, len(inside[:at]) + len(inside[at:]) - len(inside[at:].lstrip())):
        code, at = code + match[1], match.end()
    form = re.sub(r"\s+", " ", re.sub(r"\s*,\s*", ", ", code.replace("\\n", " "))).strip()
    if not form:  # tells a compiler to forget what it knows
        return "(void)0"
    operands = []
    while match := OPERAND.search(inside, at):
        at = _closing(inside, match.end())
        operands.append(inside[match.end() : at - 1])
    if form not in FORMS:
        words = form.replace("\\", "").replace('"', "'")
        return f'static_assert(false, "{place}: the emulation does not know this PTX: {words}")'
    return FORMS[form].format(*operands)


def _closing(text: str, at: int) -> int:
    """Behind the parenthesis that closes the one before `at`; strings are not looked into."""
    depth = 1
    while depth:
        if match := STRING.match(text, at):
            at = match.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at


def _split(declarators: str) -> list[str]:
    """At the commas that are not inside brackets."""
    return [each.strip() for each in re.split(r",(?![^\[]*\])", declarators)]


def _shared(kind: str, declarator: str, place: str) -> str:
    name, bracket, rest = declarator.partition("[")
    of = f"std::type_identity_t<{kind}{bracket}{rest}>"
    site = f'emulated::shared_static("{place} {name}", sizeof({of}), 16)'
    return f"auto& {name} = *static_cast<{of}*>({site});"


def _name_kernels(text: str) -> str:
    """A kernel's first statement tells the machine its name."""
    found, at = [], 0
    for match in GLOBAL.finditer(text):
        end = match.end()
        while True:  # to the parameters, past __launch_bounds__(...)
            opening = text.index("(", end)
            name = re.search(r"(\w+)\s*$", text[end:opening])
            assert name is not None
            end = _closing(text, opening + 1)
            if not name[1].startswith("__"):
                break
        brace = text.index("{", end)
        if text[end:brace].strip():
            continue  # a declaration
        found += [text[at : brace + 1], f' emulated::name_kernel("{name[1]}");']
        at = brace + 1
    return "".join([*found, text[at:]])
