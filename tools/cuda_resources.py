"""What the compiler made of the CUDA kernels, as a table in ``docs/cuda-resources.md``.

Reads registers, stack and shared memory of every kernel and architecture from the built library,
and from its machine code whether memory is accessed in 16 bytes and as global memory, whether
16-bit scoring runs on tensor cores, how many loads are in flight at once and how long the loop
around them is, that warps are whole where tensor cores ask for it, and that nothing spills to
local memory::

    python tools/cuda_resources.py            # writes the table
    python tools/cuda_resources.py --check    # compares with it

Needs cuobjdump and nvdisasm: those of the CUDA toolkit, else of the packages nvidia-cuda-cuobjdump
and nvidia-cuda-nvdisasm, which are installed into ``.cache/`` on first use.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "moekv" / "lib" / "libmoekv_cuda.so"
TABLE = ROOT / "docs" / "cuda-resources.md"
TOOLS = ROOT / ".cache" / "cuda-tools"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
PTX = {"80", "120"}  # for GPUs between these, and for those that come after
# More than recorded: another release of the compiler, not another kernel.
REGISTER_SLACK = 8
LOOP_SLACK = 1.1

# Kernels whose loops must move 16 bytes at a time, and those that must use tensor cores. Not here:
# kernels that read a few numbers per row, and mix_scores, where neighbouring threads read
# neighbouring floats.
WIDE = re.compile(
    r"gating_topk_kernel|attention_(rows|columns)_kernel|key_diversity_(sum|cosine)_kernel"
    r"|lag\w*_kernel|select_kept_(histogram|count|write|group)_kernel|kv_compact_kernel<uint4>"
    r"|ragged_attention_((tiles|coded)_)?kernel|expected_attention_kernel"
    r"|token_(norms|directions|distances)_kernel"
)
# Kernels that read rows of keys, values or tokens into registers, and must not wait for each load.
STREAMING = re.compile(
    r"key_diversity_(sum|cosine)_kernel|lag_kernel|ragged_attention_kernel"
    r"|expected_attention_kernel|token_(norms|directions|distances)_kernel"
)
LEAST_IN_FLIGHT = 4
TENSOR_CORES = re.compile(
    r"(attention_(rows|columns)|expected_attention)_kernel<__(half|nv_bfloat16)"
    r"|ragged_attention_(tiles|coded)_kernel"
)
INSTRUCTION = re.compile(r"\s*/\*(\w+)\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


@dataclasses.dataclass
class Kernel:
    """One kernel on one architecture. Bytes, and numbers of instructions."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    wide_loads: int = 0
    in_flight: int = 0
    wide_stores: int = 0
    tensor_core: int = 0
    generic: int = 0
    local: int = 0
    narrow_loads: int = 0
    loop: int = 0
    diverged: int = 0


@dataclasses.dataclass
class Instruction:
    """One of machine code. ``name`` has its suffixes, ``address`` counts bytes."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where it jumps to, or where threads that part here meet again."""
        found = re.findall(r"\b0x([0-9a-f]+)$", self.operands.strip())
        return int(found[-1], 16) if found else None


def read_instruction(match: re.Match[str]) -> Instruction:
    """Return what a line of cuobjdump says, as INSTRUCTION matches it."""
    return Instruction(int(match[1], 16), match[2] or "", match[3], match[4])


def is_wide(name: str) -> bool:
    """Whether it moves 16 bytes of a thread or more."""
    return bool(re.search(r"\.(128|256)\b", name))


def loop_of(code: list[Instruction]) -> int:
    """Return the instructions of the shortest loop around the most loads of 16 bytes; 0: none."""
    best = (0, 0)
    wide = [x.address for x in code if re.match(r"LDG(STS)?\b", x.name) and is_wide(x.name)]
    for end in code:
        if not re.match(r"BRA\b", end.name) or end.target is None or end.target > end.address:
            continue
        loads = sum(end.target <= x <= end.address for x in wide)
        length = sum(end.target <= x.address <= end.address for x in code)
        if loads:
            best = max(best, (loads, -length))
    return -best[1]


def diverged_of(code: list[Instruction]) -> int:
    """Return how many tensor core instructions lie where the threads of a warp may have parted.

    The compiler marks where they may (BSSY) and where they meet again, its target; short branches
    become predicates. PTX's ``mma.sync.aligned`` is for whole warps.
    """
    apart = [(x.address, x.target) for x in code if x.name.startswith("BSSY") and x.target]
    return sum(
        bool(x.predicate) or any(begin < x.address < end for begin, end in apart)
        for x in code
        if x.name.startswith("HMMA")
    )


class Flight:
    """Loads of 16 bytes to registers that have begun and whose result nothing has asked for.

    Instructions count in the order in which they lie. An instruction that names a register of a
    load waits for that load.
    """

    def __init__(self) -> None:
        self.pending: dict[int, int] = {}  # register -> address of the load

    def meet(self, instruction: str, operands: str, address: int) -> int:
        """Note an instruction, and return how many loads are in flight after it."""
        registers = [int(x) for x in re.findall(r"\bR(\d+)\b", operands)]
        waited = {self.pending[x] for x in registers if x in self.pending}
        self.pending = {x: load for x, load in self.pending.items() if load not in waited}
        if re.match(r"LDG\b.*\.128\b", instruction) and registers:
            self.pending |= {registers[0] + i: address for i in range(4)}
        return len(set(self.pending.values()))


Kernels = dict[str, dict[str, Kernel]]  # by name, then architecture


def find_tools() -> Path:
    """Return the folder of cuobjdump and nvdisasm."""
    candidates = [TOOLS / "nvidia" / "cu13" / "bin"]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "bin")
    if found := shutil.which("cuobjdump"):
        candidates.append(Path(found).parent)
    for _ in range(2):
        for folder in candidates:
            if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
                return folder
        packages = ["nvidia-cuda-cuobjdump==13.*", "nvidia-cuda-nvdisasm==13.*"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(TOOLS)]
        subprocess.run([*command, *packages], check=True)
    raise FileNotFoundError(f"expected cuobjdump and nvdisasm in one of {candidates}")


def dump(library: Path, *options: str) -> str:
    """Return what cuobjdump says of the library."""
    folder = find_tools()
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(folder / "cuobjdump"), *options, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def short_names(mangled: set[str]) -> dict[str, str]:
    """Return ``gating_topk_kernel<float>`` and the like for mangled names."""
    names = sorted(mangled)
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = {}
    for name, full in zip(names, done.stdout.splitlines(), strict=True):
        # Without return type, parameters and namespaces.
        match = re.search(r"(\w+_kernel)(<.*?>)?\(", full)
        if not match:
            raise ValueError(f"expected a kernel, got {full}")
        short[name] = match[1] + (match[2] or "")
    return short


def collect(library: Path) -> Kernels:
    """Read all kernels of the library."""
    found: dict[tuple[str, str], Kernel] = defaultdict(Kernel)
    architecture = name = ""
    flight = Flight()
    codes: dict[tuple[str, str], list[Instruction]] = defaultdict(list)
    for line in dump(library, "-res-usage").splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            kernel = found[name, architecture]
            kernel.registers, kernel.stack, kernel.shared = (int(match[i]) for i in (1, 2, 3))
            kernel.stack += int(match[4])
    for line in dump(library, "-sass").splitlines():
        if match := re.match(r"\s*code for sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
            flight = Flight()
        elif match := INSTRUCTION.match(line):
            kernel, code = found[name, architecture], codes[name, architecture]
            code.append(read_instruction(match))
            instruction = code[-1].name
            now = flight.meet(instruction, code[-1].operands, code[-1].address)
            kernel.in_flight = max(kernel.in_flight, now)
            wide = is_wide(instruction)
            base = instruction.split(".")[0]
            kernel.wide_loads += wide and base in ("LDG", "LDGSTS")
            kernel.wide_stores += wide and base == "STG"
            kernel.tensor_core += base == "HMMA"
            kernel.generic += base in ("LD", "ST", "ATOM")
            kernel.local += base in ("LDL", "STL")
            kernel.narrow_loads += base == "LDG" and bool(re.search(r"\.[US]16\b", instruction))
    for key, code in codes.items():
        found[key].loop, found[key].diverged = loop_of(code), diverged_of(code)
    short = short_names({mangled for mangled, _ in found})
    kernels: Kernels = defaultdict(dict)
    for (mangled, architecture), kernel in sorted(found.items()):
        kernels[short[mangled]][architecture] = kernel
    return dict(sorted(kernels.items()))


def ptx_of(library: Path) -> set[str]:
    """Return the architectures whose PTX the library holds."""
    return set(re.findall(r"\.sm_(\w+)\.ptx", dump(library, "-lptx")))


def problems(kernels: Kernels, ptx: set[str]) -> list[str]:
    """Return what is wrong, whatever the table says."""
    wrong = [f"expected PTX of sm_{x}, got none" for x in sorted(PTX - ptx)]
    for name, versions in kernels.items():
        if missing := set(ARCHITECTURES) - set(versions):
            wrong.append(f"{name}: not compiled for sm_{', sm_'.join(sorted(missing))}")
        for architecture, kernel in versions.items():
            where = f"{name} on sm_{architecture}"
            if kernel.stack or kernel.local:
                wrong.append(
                    f"{where}: expected no local memory, got {kernel.stack} bytes and "
                    f"{kernel.local} accesses"
                )
            if kernel.generic:
                wrong.append(
                    f"{where}: expected accesses to say that memory is global or shared, got "
                    f"{kernel.generic} that do not"
                )
            if WIDE.match(name) and not kernel.wide_loads:
                wrong.append(f"{where}: expected loads of 16 bytes, got none")
            if STREAMING.match(name) and kernel.in_flight < LEAST_IN_FLIGHT:
                wrong.append(
                    f"{where}: expected {LEAST_IN_FLIGHT} loads of 16 bytes in flight, "
                    f"got {kernel.in_flight}"
                )
            if name == "kv_compact_kernel<uint4>" and not kernel.wide_stores:
                wrong.append(f"{where}: expected stores of 16 bytes, got none")
            if TENSOR_CORES.match(name) and not kernel.tensor_core:
                wrong.append(f"{where}: expected tensor core instructions, got none")
            if kernel.diverged:
                wrong.append(
                    f"{where}: expected whole warps at tensor core instructions, got "
                    f"{kernel.diverged} where threads may have parted"
                )
    for pattern in (WIDE, STREAMING, TENSOR_CORES):
        if not any(pattern.match(name) for name in kernels):
            wrong.append(f"no kernel matches {pattern.pattern}")
    return wrong


HEADER = """\
# Resources of the CUDA kernels

Written by `make cuda-resources`, compared by `make cuda-check`. What the compiler says and what the
machine code holds:

- registers of a thread, per compute capability;
- shared: bytes of static shared memory of a block, beside what a launch asks for;
- loads, stores: instructions on sm_90 that move 16 bytes from global memory (to registers or to
  shared memory) and to it;
- in flight: the most loads of 16 bytes, on sm_90, that begin before the result of one is asked for;
  one alone leaves a thread to wait for each;
- HMMA: tensor core instructions on sm_90, all where no threads of a warp have parted;
- loop: instructions on sm_90 of the shortest loop around the most loads of 16 bytes, its rare paths
  included;
- narrow: loads of 16 bits from global memory on sm_90, for rows that are not aligned.

No kernel uses local memory on any architecture (no stack, no spilled register), and none leaves it
to the hardware to find out whether an address is of global or of shared memory.

"""


# Registers, shared memory, instructions of which more are better, and others.
Resources = tuple[list[int], int, dict[str, int], dict[str, int]]


def resources(versions: dict[str, Kernel]) -> Resources:
    """Return what the table says of a kernel."""
    h = versions["90"]
    counts = {
        "loads of 16 bytes": h.wide_loads,
        "loads in flight": h.in_flight,
        "stores of 16 bytes": h.wide_stores,
        "tensor core instructions": h.tensor_core,
    }
    costs = {"instructions in the loop": h.loop, "loads of 16 bits": h.narrow_loads}
    # From sm_90 on the system takes 1 KiB of its own, which would count as shared.
    registers = [versions[a].registers for a in ARCHITECTURES]
    return registers, versions["80"].shared, counts, costs


def table(kernels: Kernels) -> str:
    """Return the page."""
    rows = [
        [
            "kernel",
            *(f"sm_{a}" for a in ARCHITECTURES),
            "shared",
            "loads",
            "in flight",
            "stores",
            "HMMA",
            "loop",
            "narrow",
        ],
        ["---", *["---:"] * (len(ARCHITECTURES) + 7)],
    ]
    for name, versions in kernels.items():
        registers, shared, counts, costs = resources(versions)
        cells = [shared, *counts.values(), *costs.values()]
        rows.append([f"`{name}`", *map(str, registers), *(str(x or "") for x in cells)])
    return HEADER + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def recorded_resources(text: str) -> dict[str, list[int]]:
    """Return the numbers that a page's table has for each kernel, in its order."""
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: [int(x.strip() or 0) for x in cells.split(" | ")] for name, cells in rows}


def changes(kernels: Kernels, recorded: dict[str, list[int]]) -> list[str]:
    """Return what is worse than recorded, and kernels that came or went."""
    wrong = [f"{name}: not in the table" for name in kernels.keys() - recorded.keys()]
    wrong += [f"{name}: in the table alone" for name in recorded.keys() - kernels.keys()]
    for name in kernels.keys() & recorded.keys():
        registers, shared, counts, costs = resources(kernels[name])
        before = recorded[name]
        *registers_before, shared_before = before[: len(ARCHITECTURES) + 1]
        if shared != shared_before:
            wrong.append(
                f"{name}: expected {shared_before} bytes of shared memory as recorded, got {shared}"
            )
        instructions = before[len(ARCHITECTURES) + 1 :]
        for (what, now), at_least in zip(counts.items(), instructions, strict=False):
            if now < at_least:
                wrong.append(f"{name}: expected {at_least} {what} as recorded, got {now}")
        for (what, now), at_most in zip(costs.items(), instructions[len(counts) :], strict=True):
            slack = LOOP_SLACK if "loop" in what else 1
            if now > slack * at_most:
                wrong.append(f"{name}: expected {at_most} {what} as recorded, got {now}")
        for architecture, expected, now in zip(
            ARCHITECTURES, registers_before, registers, strict=True
        ):
            if now > expected + REGISTER_SLACK:
                wrong.append(
                    f"{name} on sm_{architecture}: expected {expected} registers as recorded, "
                    f"got {now}"
                )
    return sorted(wrong)


def main() -> None:
    """Write the table, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the table")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    arguments = parser.parse_args()
    if not arguments.library.exists():
        sys.exit(f"expected {arguments.library}: build it with `make cuda-build`")
    kernels = collect(arguments.library)
    wrong = problems(kernels, ptx_of(arguments.library))
    if arguments.check:
        wrong += changes(kernels, recorded_resources(TABLE.read_text()))
    if wrong:
        sys.exit("\n".join([*wrong, "After a change that means it: make cuda-resources"]))
    if arguments.check:
        print(f"{len(kernels)} kernels on {len(ARCHITECTURES)} architectures: as recorded")
    else:
        TABLE.write_text(table(kernels))
        print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
