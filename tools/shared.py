"""Keeps the shared sections of the scripts the same text: python tools/shared.py [--check]

A section begins with a heading like "# ==== shared: environments ====" and ends before the next one, or at the end of
the file. It is edited in ppo.py, in grpo_toy.py if ppo.py does not have it, or in dpo_toy.py if neither has. This tool
copies it into every other script that has the heading. With --check it changes nothing, names each section that
differs, and exits with 1.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("ppo.py", "grpo_toy.py", "dpo_toy.py")
HEADING = re.compile(r"^# ==== (?!The machine room).+ ====\n", re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """Headings and the text from each to the next one. What stands before the first one has the heading ""."""
    starts = [0, *(match.start() for match in HEADING.finditer(text)), len(text)]
    parts = [text[start:end] for start, end in zip(starts, starts[1:])]
    return {part.split("\n")[0] if HEADING.match(part) else "": part for part in parts}


def scripts() -> list[Path]:
    """The scripts that have shared sections."""
    return sorted(path for path in ROOT.glob("*.py") if "\n# ==== shared: " in path.read_text(encoding="utf-8"))


def shared_sections() -> dict[str, tuple[str, str]]:
    """Heading -> (source, text) of every shared section."""
    found: dict[str, tuple[str, str]] = {}
    for source in SOURCES:
        for heading, text in sections((ROOT / source).read_text(encoding="utf-8")).items():
            if heading.startswith("# ==== shared: "):
                found.setdefault(heading, (source, text))
    return found


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        print(__doc__)
        return 2
    shared = shared_sections()
    drifted = 0
    for path in scripts():
        parts = sections(path.read_text(encoding="utf-8"))
        for heading, text in parts.items():
            if not heading.startswith("# ==== shared: "):
                continue
            if heading not in shared:
                print(f"{path.name}: no script of {', '.join(SOURCES)} has the section {heading.strip('# =')!r}")
                drifted += 1
            elif text.rstrip() != shared[heading][1].rstrip():
                print(f"{path.name}: the section {heading.strip('# =')!r} is not that of {shared[heading][0]}")
                drifted += 1
                parts[heading] = shared[heading][1]
        if argv != ["--check"]:
            *before, last = parts.values()
            path.write_text("".join(before) + last.rstrip() + "\n", encoding="utf-8")
    if argv != ["--check"]:
        return 0
    print("all shared sections are the same text" if not drifted else f"{drifted} sections differ")
    return int(drifted > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
