"""Remembered launches: the kernel is the one that Triton picks, its arguments are those that Triton
passes, and whatever must see a launch still sees it."""

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton import language as tl
from triton.runtime import OutOfResources, driver
from triton.runtime.jit import JITFunction

from fused_inception.kernels import relaunch
from tests.compiled.collect import StubDriver

GRID = (3, 2)
BYTES = torch.zeros(256, dtype=torch.uint8)
X = BYTES[:64].view(torch.float16)
CONSTANTS = {"BLOCK": 16, "RELU": True}


def _kernel(x_ptr, y_ptr, n, m, scale, BLOCK: tl.constexpr, RELU: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


def _staged_kernel(  # type: ignore[no-untyped-def]
    x_ptr, BLOCK: tl.constexpr, NUM_STAGES: tl.constexpr, INPUT_STAGES: tl.constexpr
):
    pass


class Compiled:
    """What stands for a compiled kernel, and counts how it is launched."""

    function = 7
    packed_metadata = (4, 1, 0)

    def __init__(self, launched: list[tuple["Compiled", tuple[Any, ...]]]) -> None:
        self.launched = launched

    def launch_metadata(self, *_: Any) -> None:
        return None

    @property
    def run(self) -> Callable[..., None]:
        # as Triton's, it does not keep the kernel that it is of
        launched, this = self.launched, weakref.ref(self)

        def launch(*arguments: Any) -> None:
            # Triton passes its empty chains of hooks
            plain = tuple(None if isinstance(a, knobs.HookChain) else a for a in arguments)
            compiled = this()
            assert compiled is not None
            launched.append((compiled, plain))

        return launch


class Session:
    """A kernel, what was launched of it, and how often Triton itself was asked."""

    def __init__(self) -> None:
        self.kernel = JITFunction(_kernel, do_not_specialize=["m"])
        self.launched: list[tuple[Compiled, tuple[Any, ...]]] = []
        self.asked = 0

    def launch(self, *args: Any, num_warps: int = 4, **constants: Any) -> Compiled:
        """By `relaunch`; what it launched."""
        relaunch.launch(self.kernel, GRID, args, CONSTANTS | constants, num_warps)
        return self.launched[-1][0]

    def launch_by_triton(self, *args: Any, num_warps: int = 4, **constants: Any) -> Compiled:
        self.kernel[GRID](*args, **CONSTANTS | constants, num_warps=num_warps)
        return self.launched[-1][0]

    def is_remembered(self, *args: Any, **options: Any) -> bool:
        """Whether the second of two launches does without Triton."""
        self.launch(*args, **options)
        asked = self.asked
        self.launch(*args, **options)
        return self.asked == asked


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    made = Session()
    run = JITFunction.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.asked += 1
        return run(*args, **kwargs)

    def compiled(kernel: Any, key: Any, _: Any, device: Any, *__: Any) -> Compiled:
        kernel.device_caches[device][0][key] = found = Compiled(made.launched)
        return found

    monkeypatch.setattr(driver, "_active", StubDriver("sm_90"))
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(relaunch, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(relaunch, "_known", {})
    monkeypatch.setattr(relaunch, "_kinds", type(relaunch._kinds)())
    with knobs.runtime.scope(), knobs.compilation.scope():
        # chains of this test alone, as a hook is added in place
        knobs.runtime.launch_enter_hook = knobs.HookChain()
        knobs.runtime.launch_exit_hook = knobs.HookChain()
        yield made


def test_arguments_are_those_that_triton_passes(session: Session) -> None:
    args = (X, None, 16, 3, 0.5)
    for launch in (session.launch_by_triton, session.launch, session.launch):
        launch(*args)
    assert session.asked == 2
    by_triton, first, again = (arguments for _, arguments in session.launched)
    assert by_triton == first == again
    assert again[:6] == (3, 2, 1, 0, 7, (4, 1, 0))
    assert again[-7:] == (*args, 16, True)


def test_constants_go_by_their_names(session: Session) -> None:
    for _ in range(2):
        relaunch.launch(
            session.kernel, GRID, (X, X, 1, 1, 1.0), {"RELU": False, "BLOCK": 32}, num_warps=4
        )
        assert session.launched[-1][1][-2:] == (32, False)
    assert session.asked == 1


POINTERS = [X, X[8:], X[4:], BYTES[1:], BYTES.view(torch.bfloat16), X.float(), None]
INTEGERS = [0, 1, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1,
            2**63 - 1, 2**63, 2**63 + 1]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"BLOCK": 32}, {"RELU": False}, {"BLOCK": 32, "RELU": None}, {"num_warps": 8}
]  # fmt: skip


def launches() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments and options that Triton compiles many kernels for."""
    for x, y in itertools.product(POINTERS[:-1], POINTERS):
        yield (x, y, 16, 16, 0.5), {}
    for n, m in itertools.product(INTEGERS, INTEGERS):
        yield (X, None, n, m, 0.5), {}
    # tuples, of one element and two, the first argument among them
    for pointers in itertools.product(POINTERS[:-1], POINTERS):
        yield (X, pointers, 3, 3, 0.5), {}
        yield (pointers, None, 3, 3, 0.5), {}
        yield ((), pointers[:1], 3, 3, 0.5), {}
    for numbers in itertools.product(INTEGERS[:7], INTEGERS[:7]):
        yield (X, None, numbers, 3, 0.5), {}
        yield (X, None, 3, numbers, 0.5), {}
    for scale, options in itertools.product((0.5, 1.0, 1, 16, None), OPTIONS):
        yield (X, X, 3, 3, scale), options


def test_kernel_is_the_one_that_triton_picks(session: Session) -> None:
    every = list(launches())
    want = [session.launch_by_triton(*args, **options) for args, options in every]
    assert len(set(want)) > 50
    first = [session.launch(*args, **options) for args, options in every]
    asked = session.asked
    again = [session.launch(*args, **options) for args, options in every]
    assert session.asked == asked, "none was remembered"
    assert first == want
    assert again == want


@pytest.mark.parametrize(
    "change",
    [
        lambda: setattr(knobs.runtime, "debug", True),
        lambda: setattr(knobs.compilation, "instrumentation_mode", "consan"),
    ],
    ids=["debug", "instrumentation"],
)
def test_settings_of_triton_change_the_kernel(session: Session, change: Callable[[], None]) -> None:
    args = (X, X, 3, 3, 0.5)
    before = session.launch(*args)
    change()
    assert session.launch(*args) is not before
    assert session.launch(*args) is session.launch_by_triton(*args) is not before


def test_debug_of_the_kernel(session: Session) -> None:
    args = (X, X, 3, 3, 0.5)
    before = session.launch(*args)
    session.kernel.debug = True
    assert session.launch(*args) is session.launch_by_triton(*args) is not before


def _hook(*_: Any, **__: Any) -> None:
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda _: knobs.runtime.launch_enter_hook.add(_hook),
        lambda _: knobs.runtime.launch_exit_hook.add(_hook),
        lambda _: setattr(knobs.runtime, "launch_enter_hook", _hook),
        lambda _: setattr(knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash")),
        lambda session: session.kernel.add_pre_run_hook(_hook),
        lambda session: session.kernel.used_global_vals.update({("GRID", 0): (GRID, globals())}),
    ],
    ids=["enter", "exit", "plain-function", "stages", "pre-run", "globals"],
)
def test_whoever_must_see_a_launch_sees_it(
    session: Session, change: Callable[[Session], None]
) -> None:
    args = (X, X, 3, 3, 0.5)
    assert session.is_remembered(*args)
    change(session)
    assert not session.is_remembered(*args)


@pytest.mark.parametrize("arg", [True, (1, True), torch.dtype], ids=["bool", "in-tuple", "other"])
def test_arguments_without_a_rule_go_to_triton(session: Session, arg: Any) -> None:
    with pytest.raises(TypeError):
        relaunch._key(session.kernel, (X, X, arg, 3, 0.5), CONSTANTS, 4)
    if arg is not torch.dtype:
        assert not session.is_remembered(X, X, arg, 3, 0.5)


def test_constants_without_a_hash_go_to_triton(session: Session) -> None:
    # and Triton refuses them
    with pytest.raises(TypeError, match="unhashable"):
        session.launch(X, X, 3, 3, 0.5, BLOCK=[16])
    assert session.asked == 1


def test_only_where_the_rules_hold(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    args = (X, X, 3, 3, 0.5)
    assert session.is_remembered(*args)
    # another driver, whose kernels are its own
    monkeypatch.setattr(driver, "_active", StubDriver("sm_90"))
    asked = session.asked
    session.launch(*args)
    assert session.asked == asked + 1
    # a type of device that is not in the list
    monkeypatch.setattr(relaunch, "DEVICES", frozenset({"cuda"}))
    assert not session.is_remembered(*args)


def test_a_kernel_that_was_not_compiled_is_not_remembered(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_it = JITFunction._do_compile
    # as where a hook stops the compilation
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *_: None)
    args = (X, X, 3, 3, 0.5)
    relaunch.launch(session.kernel, GRID, args, CONSTANTS, 4)
    assert not session.launched
    monkeypatch.setattr(JITFunction, "_do_compile", compile_it)
    session.launch(*args)
    assert len(session.launched) == 1


def test_a_remembered_kernel_stays_loaded(session: Session) -> None:
    # Triton 3.8 unloads a kernel that nobody holds
    alive = weakref.ref(session.launch(X, X, 3, 3, 0.5))
    session.launched.clear()
    session.kernel.device_caches.clear()
    gc.collect()
    assert alive() is not None
    assert session.launch(X, X, 3, 3, 0.5) is alive()
    assert session.asked == 1


def test_fewer_stages_where_shared_memory_does_not_hold_them(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = JITFunction(_staged_kernel)
    limit = 2

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        if options["NUM_STAGES"] > limit:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return counted(self, *args, **options)

    counted = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", launch)
    constants = {"BLOCK": 16, "NUM_STAGES": 4, "INPUT_STAGES": 1}
    with pytest.warns(UserWarning, match=r"Required: 300000, .* with .*'NUM_STAGES': 2") as told:
        relaunch.launch(kernel, GRID, (X,), constants, 4)
    assert len(told) == 1
    relaunch.launch(kernel, GRID, (X,), constants, 4)
    # remembered: with two stages, without a warning, and without asking Triton
    assert session.asked == 1
    assert [arguments[-3:] for _, arguments in session.launched] == [(16, 2, 1)] * 2
    assert constants["NUM_STAGES"] == 4
    limit = 0
    with pytest.raises(OutOfResources, match="300000"):
        relaunch.launch(kernel, GRID, (X[8:],), {**constants, "BLOCK": 32}, 4)


def test_the_installed_triton_is_one_whose_launches_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.version.hip is None:
        assert relaunch.why_not() == ""
    # each version is looked at: a launch with wrong arguments crashes
    for version in ("3.5.1", "3.70.0", "4.0.0"):
        monkeypatch.setattr("triton.__version__", version)
        assert version in relaunch.why_not()
    monkeypatch.setattr("torch.version.hip", "7.0")
    assert "AMD" in relaunch.why_not()


def test_memory_of_integers_is_bounded(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaunch, "_MOST_INTEGERS", 4)
    for n in range(32):
        assert session.launch(X, X, n, 3, 0.5) is session.launch_by_triton(X, X, n, 3, 0.5)
    assert len(relaunch._kinds) == 4
