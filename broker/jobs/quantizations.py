"""Quantization names as people and GGUF files spell them, and as bakeoff's table has them.

A file says `Q4_K_M`, `F16` or `UD-Q4_K_XL`; the table says `q4_k_m` and `fp16`, and knows no name
for the last. A name that it does not have is never taken for a similar one: the VRAM need of a run
is calculated from it.
"""

import re
from collections.abc import Collection

# bakeoff's table, as its migrations fill it: what is known without a server, which publishes its
# own list (/.well-known/bakeoff-queue.json). Nothing that has a database goes by this one.
KNOWN = (
    *("fp32", "fp16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q5_1"),
    *("q4_k_m", "q4_k_s", "q4_0", "q4_1", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
    *("iq4_xs", "iq4_nl", "iq3_m", "iq3_s", "iq3_xxs", "iq2_m", "iq2_xs", "iq2_xxs"),
    *("iq1_m", "iq1_s"),
)
_OTHER_NAMES = {"f32": "fp32", "f16": "fp16"}
# A quantization as a part of a file's name: Unsloth's dynamic ones begin with UD, ternary ones with
# TQ, and after the bits come parts such as _K_M, _XXS, _0 and _4_4 (repacked).
_IN_A_NAME = re.compile(
    r"(?<![a-z0-9])"
    r"(?:(?:ud[-_])?(?:i|t)?q[1-9](?:_[a-z0-9]{1,3})+|bf16|fp?16|fp?32|fp?8|mxfp[468]|nvfp4|int[48])"
    r"(?:_moe)?(?![a-z0-9])"
)


def canonical(name: str) -> str:
    """Return a name as the table spells it: lower case, _ for -, and fp16 for F16."""
    plain = name.lower().replace("-", "_")
    return _OTHER_NAMES.get(plain, plain)


def find(name: str, known: Collection[str]) -> str | None:
    """Return which of the known names this one is, or None. A name that is known is itself."""
    if name in known:
        return name
    plain = canonical(name)
    return plain if plain in known else None


def in_file_name(name: str) -> list[str]:
    """Return the quantizations that a file's name holds, each once, spelled as the table does."""
    found = (canonical(part) for part in _IN_A_NAME.findall(name.lower()))
    return list(dict.fromkeys(found))
