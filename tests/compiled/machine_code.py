"""Reads machine code: registers, spills, tensor-core instructions, loads, and each inner loop."""

import functools
import linecache
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Load:
    """The instructions that one `tl.load` of the source became."""

    file: str
    line: int
    instructions: int
    narrowest: int  # bytes of its narrowest instruction
    widest: int

    @property
    def text(self) -> str:
        """The line of source."""
        text = linecache.getline(self.file, self.line).strip()
        if not text:
            raise LookupError(f"{self.file} has no source in line {self.line}")
        return text


@dataclass(frozen=True)
class Loop:
    """One innermost loop that loads or multiplies."""

    function: str  # that holds its first load
    instructions: int  # of one step
    spills: int  # those that reach the thread's local memory
    tensor_cycles: int  # of sm_90's tensor cores, for the step of one warp group

    @property
    def issue_ratio(self) -> float:
        """Issue slots per tensor-core cycle: above 1 the tensor cores wait for instructions."""
        return self.instructions / self.tensor_cycles if self.tensor_cycles else 0.0


@dataclass(frozen=True)
class MachineCode:
    """One kernel."""

    registers: int
    stack: int  # bytes of a thread's local memory
    tensor_cores: dict[str, int]  # instruction -> how many of it
    loads: tuple[Load, ...]
    loops: tuple[Loop, ...]


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    file: str
    lines: list[int]  # several where a load may be any of theirs
    branch: str  # label, or empty
    load_bytes: int  # 0 if it loads nothing from global memory

    @property
    def is_spill(self) -> bool:
        return self.opcode.startswith(("LDL", "STL", "scratch_"))


# longest names first
_TENSOR_CORES = re.compile(r"UTC\w*MMA|HGMMA|QGMMA|HMMA|QMMA|OMMA|v_s?mfma\w*|v_smfmac\w*")


def read_nvidia(cubin: bytes, ptx: str) -> MachineCode:
    """A cubin, through the disassembler that comes with Triton, and the PTX that it is of."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        # without the dataflow analysis, a quarter of its time, which changes nothing here
        code = _output(tools / "nvdisasm", "-c", "-g", "-ndf", file.name)
    instructions, labels = _parse_sass(code, moved_loads(ptx))
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return _machine_code(found["REG"], found["STACK"] + found["LOCAL"], instructions, labels)


def read_amd(assembly: str) -> MachineCode:
    """The assembly of an AMD kernel, with its metadata."""
    fields = {k: int(v) for k, v in re.findall(r"\.(\w+):\s*(\d+)\s*$", assembly, re.MULTILINE)}
    instructions, labels = _parse_amd(assembly)
    stack = fields["private_segment_fixed_size"] + 4 * fields["vgpr_spill_count"]
    return _machine_code(fields["vgpr_count"], stack, instructions, labels)


def _machine_code(
    registers: int, stack: int, instructions: list[_Instruction], labels: dict[str, int]
) -> MachineCode:
    if not instructions:
        raise ValueError("no instruction found")
    return MachineCode(
        registers,
        stack,
        _count_tensor_cores(instructions),
        tuple(_loads(instructions)),
        tuple(_loops(instructions, labels)),
    )


def _output(*command: object) -> str:
    # nvdisasm warns of mixed formats on stderr, and does its work
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def moved_loads(ptx: str) -> dict[tuple[str, int, int], list[int]]:
    """(file, line, bytes) of loads that look as if they were further down -> their lines.

    Triton writes a load as one piece of assembly, in front of it what lanes that are masked off
    have. Since 3.8 each line of that counts as one more line of the source.
    """
    files = {n: source_file(name) for n, name in re.findall(r'\.file\s+(\d+) "(.*?)"', ptx)}
    moved: dict[tuple[str, int, int], list[int]] = {}
    for text in re.findall(r"// begin inline asm\n(.*?)// end inline asm", ptx, re.DOTALL):
        lines = re.findall(r"\.loc\s+(\d+) (\d+)", text)
        load = re.search(r"\bld\.global\S*?(?:\.v(\d))?\.b(\d+) ", text)
        if load and len(lines) > 1:
            (file, first), (_, last) = lines[0], lines[-1]
            load_bytes = int(load[1] or 1) * int(load[2]) // 8
            there = moved.setdefault((files[file], int(last), load_bytes), [])
            if int(first) not in there:
                there.append(int(first))
    return moved


def _parse_sass(
    code: str, moved: dict[tuple[str, int, int], list[int]]
) -> tuple[list[_Instruction], dict[str, int]]:
    instruction = re.compile(r"\s+/\*[0-9a-f]+\*/\s+\{?\s*(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*);")
    found: list[_Instruction] = []
    labels: dict[str, int] = {}
    file, line = "", 0
    for text in code.splitlines():
        if m := re.match(r'\s*//## File "(.*?)", line (\d+)', text):
            file, line = source_file(m[1]), int(m[2])
        elif m := re.match(r"(\.L_x_\d+):", text):
            labels[m[1]] = len(found)
        elif m := instruction.match(text):
            label = re.search(r"`\((\.L_x_\d+)\)", m[2]) if m[1].startswith("BRA") else None
            width = _sass_bytes(m[1])
            lines = moved.get((file, line, width), [line])
            found.append(_Instruction(m[1], file, lines, label[1] if label else "", width))
    return found, labels


def _sass_bytes(opcode: str) -> int:
    """LDGSTS.E.BYPASS.128, LDG.E.U16.CONSTANT; 32 bits where the opcode names no width."""
    name, *modifiers = opcode.split(".")
    if name not in ("LDG", "LDGSTS"):
        return 0
    bits = [int(m) for x in modifiers if (m := x.lstrip("US")) in ("8", "16", "64", "128")]
    return bits[0] // 8 if bits else 4


def _parse_amd(assembly: str) -> tuple[list[_Instruction], dict[str, int]]:
    found: list[_Instruction] = []
    labels: dict[str, int] = {}
    files: dict[str, str] = {}
    file, line = "", 0
    for text in assembly.splitlines():
        if m := re.match(r'\s+\.file\s+(\d+)\s+"(.*?)"(?:\s+"(.*?)")?', text):
            files[m[1]] = f"{m[2]}/{m[3]}" if m[3] else m[2]
        elif m := re.match(r"\s+\.loc\s+(\d+)\s+(\d+)", text):
            file, line = source_file(files[m[1]]), int(m[2])
        elif m := re.match(r"(\.LBB\w+):", text):
            labels[m[1]] = len(found)
        elif m := re.match(r"\s+([a-z]\w+)(.*)", text):
            label = re.search(r"\.LBB\w+", m[2]) if m[1].startswith("s_cbranch") else None
            found.append(
                _Instruction(m[1], file, [line], label[0] if label else "", _amd_bytes(m[1]))
            )
    return found, labels


def _amd_bytes(opcode: str) -> int:
    """global_load_dwordx4, buffer_load_ushort."""
    m = re.match(r"(?:global|buffer)_load_[us]?(byte|short|dword)(?:x(\d))?", opcode)
    return {"byte": 1, "short": 2, "dword": 4}[m[1]] * int(m[2] or 1) if m else 0


def _count_tensor_cores(instructions: Iterable[_Instruction]) -> dict[str, int]:
    names = (m[0] for i in instructions if (m := _TENSOR_CORES.match(i.opcode)))
    return dict(Counter("MFMA" if name.startswith("v_") else name for name in names))


def _loads(instructions: Iterable[_Instruction]) -> Iterator[Load]:
    widths: dict[tuple[str, int], list[int]] = {}
    for i in instructions:
        if i.load_bytes:
            for line in i.lines:
                widths.setdefault((i.file, line), []).append(i.load_bytes)
    for (file, line), each in widths.items():
        yield Load(file, line, len(each), min(each), max(each))


def _loops(instructions: list[_Instruction], labels: dict[str, int]) -> Iterator[Loop]:
    spans = {
        (labels[i.branch], n)
        for n, i in enumerate(instructions)
        if i.branch in labels and labels[i.branch] < n
    }
    for first, last in sorted(spans):
        if any(first <= a and b <= last for a, b in spans - {(first, last)}):
            continue  # holds another loop
        body = instructions[first : last + 1]
        marks = [i for i in body if i.load_bytes or _TENSOR_CORES.match(i.opcode)]
        if marks:
            where = next((i for i in marks if i.load_bytes), marks[0])
            yield Loop(
                function=_function(where.file, where.lines[0]),
                instructions=len(body),
                spills=sum(i.is_spill for i in body),
                tensor_cycles=sum(map(_tensor_cycles, body)),
            )


def _tensor_cycles(instruction: _Instruction) -> int:
    # 64 x N x 16 products of 16-bit numbers, or 64 x N x 8 of TF32, take a warp group N / 2 cycles
    m = re.match(r"HGMMA\.64x(\d+)x\d+", instruction.opcode)
    return int(m[1]) // 2 if m else 0


@functools.cache
def source_file(file: str) -> str:
    """Where this checkout has `file`: Triton's cache holds what another one compiled alike."""
    parts = Path(file).parts
    tails = (ROOT.joinpath(*parts[n:]) for n in range(1, len(parts)))
    return next((str(tail) for tail in tails if tail.is_file()), file)


@functools.cache
def _function(file: str, line: int) -> str:
    for number in range(line, 0, -1):
        if m := re.match(r"def (\w+)\(", linecache.getline(file, number)):
            return m[1]
    return f"{Path(file).name}:{line}"
