"""Reads PTX as Triton writes it: one entry, no calls."""

import re
from dataclasses import dataclass

# .reg .b32 %r<600>;
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+)<(\d+)>;")
_PARAMETER = re.compile(r"\.param \.(\w+)(?: \.ptr[^,]*?)? (\w+_param_\d+),?$")
_TARGETS = re.compile(r"^(\$\w+): \.branchtargets$")
_LOC = re.compile(r"\.loc\s+(\d+) (\d+)")
_FILE = re.compile(r'\.file\s+(\d+) "([^"]*)"(?: "([^"]*)")?')


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands;`, operands as written; vectors are one operand `{a, b}`."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str = ""  # "%p1", "!%p1" or empty
    line: tuple[int, int] = (0, 0)  # number of the source file, line
    text: str = ""


@dataclass(frozen=True)
class Program:
    """One kernel."""

    name: str
    parameters: tuple[tuple[str, str], ...]  # type, name
    registers: dict[str, tuple[str, int]]  # "%r" -> ("b32", how many)
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # label -> index of the instruction behind it
    tables: dict[str, tuple[str, ...]]  # of brx.idx: its labels
    threads: int
    files: dict[int, str]


def _split(text: str) -> tuple[str, ...]:
    """Operands at the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return tuple([*parts, last] if last else parts)


def parse(text: str) -> Program:
    """The kernel in `text`.

    Raises:
        ValueError: a line that is none of PTX's as Triton writes it.
    """
    # of shared memory, Triton 3.8 says whose: a program's own
    text = re.sub(r"\b(ld|st)\.shared::cta\b", r"\1.shared", text)
    lines = iter(text.splitlines())
    name, threads = "", 0
    parameters: list[tuple[str, str]] = []
    for line in lines:
        if m := re.match(r"\.visible \.entry (\w+)\(", line):
            name = m[1]
        elif m := _PARAMETER.match(line.strip()):
            parameters.append((m[1], m[2]))
        elif m := re.match(r"\.reqntid (\d+)", line):
            threads = int(m[1])
        elif line == "{":
            break
    registers: dict[str, tuple[str, int]] = {}
    labels: dict[str, int] = {}
    tables: dict[str, tuple[str, ...]] = {}
    instructions: list[Instruction] = []
    files: dict[int, str] = {}
    where = (0, 0)
    pending = ""
    for raw in lines:
        line = raw.split("//")[0].strip()
        if raw == "}":
            break
        if m := _LOC.match(line):
            where = (int(m[1]), int(m[2]))
            continue
        if not line or line in "{}" or line.startswith((".pragma", ".local", ".loc")):
            continue
        if m := _REGISTERS.match(line):
            registers[m[2]] = (m[1], int(m[3]))
            continue
        if m := re.match(r"^([$\w]+):\s*(\.branchtargets)?$", line):
            if m[2]:
                pending = m[1] + "\0"
            else:
                labels[m[1]] = len(instructions)
            continue
        pending += line + " "
        if not line.endswith(";"):
            continue
        statement, pending = pending.strip(), ""
        if "\0" in statement:
            table, targets = statement.split("\0")
            tables[table] = tuple(t.strip() for t in targets.rstrip("; ").split(","))
            continue
        for part in statement.rstrip(";").split(";"):
            instructions.append(_instruction(part.strip(), where))
    for line in text.splitlines():
        if m := _FILE.match(line.strip()):
            files[int(m[1])] = f"{m[2]}/{m[3]}" if m[3] else m[2]
    return Program(
        name, tuple(parameters), registers, tuple(instructions), labels, tables, threads, files
    )


def _instruction(text: str, where: tuple[int, int]) -> Instruction:
    m = re.match(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.DOTALL)
    if m is None:
        raise ValueError(f"not an instruction: {text!r}")
    opcode = tuple(m[2].replace("::", "_").split("."))
    return Instruction(opcode, _split(m[3]), m[1] or "", where, text)
