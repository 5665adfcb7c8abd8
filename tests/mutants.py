"""Plants faults in a copy of the library, and shows that the tests see each: ``make mutants``.

A fault is a small edit of one file. The tests that are to fail are named, so that all of them take
minutes; the fast suite contains them. A fault that no test sees, or whose text is no longer there,
makes the command fail.

    python -m tests.mutants [words of faults' names ...]
    python -m tests.mutants --table
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.zoos import declare_missing_ops

ROOT = Path(__file__).parent.parent
#: What is copied.
PARTS = ("lrpfx", "tests", "benchmarks", "examples", "pyproject.toml", "README.md")


class Mutant(NamedTuple):
    """A fault.

    Args:
        name: What is wrong.
        file: Where, in the package.
        old: What stands there, exactly once.
        new: What is planted in its place.
        tests: The test file that sees it.
        only: As pytest's ``-k``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    only: str = ""


ORACLE = "tests/rules/test_laws.py"
SAYS = "oracle_says"
#: A small network, every rule on all its layers.
PEER, SIGNED = "tests/rules/test_parity_zennit.py", "rule_on_signed"

MUTANTS = [
    # -- formulas of rules
    Mutant(
        "epsilon divides by a thousandth too much",
        "rules/affine.py",
        '"""d = W x + b = z."""\n        return [Term([(x.all, f)], f.bias, total=z)]',
        '"""d = W x + b = z."""\n        return [Term([(x.all, f)], f.bias, total=z * 1.001)]',
        ORACLE,
        SAYS,
    ),
    Mutant(
        "z-plus forgets the bias",
        "rules/affine.py",
        'return [Term(_agreeing(x, f), f.bias_part(positive, "pos"), sign=1)]',
        "return [Term(_agreeing(x, f), sign=1)]",
        PEER,
        SIGNED,
    ),
    Mutant(
        "alpha-beta takes the positive part twice",
        "rules/affine.py",
        "minus = Term(_opposing(x, f),",
        "minus = Term(_agreeing(x, f),",
        PEER,
        SIGNED,
    ),
    Mutant(
        "gamma favours the same sign below zero",
        "rules/affine.py",
        "down = f.with_weight(lambda w: torch.add(w, negative(w), alpha=g),",
        "down = f.with_weight(lambda w: torch.add(w, positive(w), alpha=g),",
        PEER,
        SIGNED,
    ),
    Mutant(
        "z-box exchanges the corners of its box",
        "rules/affine.py",
        "(low, f.pos), (high, f.neg)",
        "(low, f.neg), (high, f.pos)",
        PEER,
        SIGNED,
    ),
    Mutant(
        "w-square does not square negative weights",
        "rules/affine.py",
        "(x.one, f.square)",
        "(x.one, f.pos)",
        PEER,
        SIGNED,
    ),
    Mutant(
        "guided backprop forgets the input's sign",
        "rules/pointwise.py",
        "return R.relu() * (x > 0).to(R.dtype)",
        "return R.relu()",
        PEER,
        "test_composite and residual and guided",
    ),
    Mutant(
        "the smoothed ReLU forgets beta",
        "rules/pointwise.py",
        "torch.sigmoid(self.beta * x)",
        "torch.sigmoid(x)",
        PEER,
        "test_composite and residual and smooth",
    ),
    Mutant(
        "a smooth pool shares evenly",
        "rules/pools.py",
        "return x * s",
        "return inside * s",
        "tests/rules/test_pools.py",
        "can_win",
    ),
    Mutant(
        "of a minimum the largest take most",
        "rules/pools.py",
        "(sign * self.beta * widened(x))",
        "(self.beta * widened(x))",
        "tests/rules/test_pools.py",
        "smallest",
    ),
    Mutant(
        "a window in ceil mode begins past the end",
        "ops/pools.py",
        "        count -= 1  # a",
        "        pass  # a",
        "tests/rules/test_pools.py",
        "can_win",
    ),
    Mutant(
        "SIGN takes zero for negative",
        "rules/signed.py",
        "x >= mu.expand",
        "x > mu.expand",
        "tests/rules/test_laws.py",
        SAYS,
    ),
    Mutant(
        "relevance of clusters begins at the origin",
        "neuralize.py",
        "Offset(-(own + other) / 2)",
        "Offset(-other)",
        "tests/test_neuralize.py",
        "paper",
    ),
    Mutant(
        "the stabilizer takes zero for negative",
        "rules/base.py",
        "stable = torch.where(z >= 0, z + stabilizer, z - stabilizer)",
        "stable = torch.where(z > 0, z + stabilizer, z - stabilizer)",
        "tests/rules/test_stabilizer.py",
    ),
    Mutant(
        "first layers count the padding",
        "rules/terms.py",
        "self.padded(t.new_ones(()).expand(t.shape)) for t in self.inside",
        "t.new_ones(()).expand(t.shape) for t in self.all",
        "tests/canonize/folding/test_folding.py",
        "padding",
    ),
    Mutant(
        "each matrix of a product gets all",
        "rules/bilinear.py",
        "d = len(x) * z",
        "d = z",
        "tests/canonize/opened/test_attention.py",
        "formulas",
    ),
    Mutant(
        "softmax forgets what its sum takes",
        "rules/bilinear.py",
        'return R - z * R.sum(call.argument("dim"), keepdim=True)',
        "return R",
        "tests/canonize/opened/test_attention.py",
        "formulas",
    ),
    Mutant(
        "a product in a product counts once",
        "rules/bilinear.py",
        "counts = (1,) * len(site.live) if self.pairwise else site.factors",
        "counts = (1,) * len(site.live)",
        "tests/canonize/opened/test_attention.py",
        "association",
    ),
    # -- ops and signs
    Mutant(
        "what is subtracted keeps its sign",
        "ops/table_affine.py",
        "affine=maps.addition(lambda alpha: (1, -alpha))",
        "affine=maps.addition(lambda alpha: (1, alpha))",
        "tests/ops/test_table.py",
        "lrp_0 and sub",
    ),
    Mutant(
        "what a negative number is added to is proven non-negative",
        "ops/table_affine.py",
        "and bool(numbers) and numbers[0] >= 0",
        "and bool(numbers)",
        "tests/test_zoo.py",
        "non_negative and odd_signs",
    ),
    Mutant(
        "a transposed convolution keeps what lies past its input",
        "ops/maps.py",
        "c = c.narrow(dim, 0, size)",
        "c = c.narrow(dim, c.shape[dim] - size, size)",
        "tests/ops/test_table.py",
        "lrp_0 and dilated",
    ),
    # -- passes
    Mutant(
        "batch norm is folded past zero padding",
        "canonize/folding/ahead.py",
        'return padding == "valid" or (padding != "same" and not any(padding))',
        "return True",
        "tests/canonize/test_passes.py",
        "batch_norm or fold",
    ),
    Mutant(
        "what is written is not seen by other views",
        "canonize/writes/memory.py",
        "        if node not in self._source or time == latest:",
        "        if True:",
        "tests/canonize/writes/test_memory.py",
        "writes",
    ),
    Mutant(
        "a folded bias is not scaled",
        "canonize/folding/fold.py",
        "bias = None if bias is None else insert(node, aten.mul.Tensor, (bias, scale))",
        "pass",
        "tests/canonize/folding/test_folding.py",
        "folded",
    ),
    Mutant(
        "the mask of another tensor makes a ReLU",
        "canonize/whole/by_hand.py",
        "if is_zero(b) and sign(mask) == (a, 1):",
        "if is_zero(b) and sign(mask)[1] == 1:",
        "tests/canonize/whole/test_activations.py",
        "another",
    ),
    Mutant(
        "a sigmoid by hand loses its sign",
        "canonize/whole/by_hand.py",
        "        x = insert(node, aten.neg.default, (x,))",
        "        pass",
        "tests/canonize/whole/test_activations.py",
        "sigmoid",
    ),
    Mutant(
        "what is computed twice counts as two values",
        "canonize/same.py",
        "return self._first.get(node, node)",
        "return node",
        "tests/canonize/whole/test_gates.py",
        "twice",
    ),
    Mutant(
        "any exponential less a logarithm is a softmax",
        "canonize/forms.py",
        "    return bool(weights.isfinite().all()) and all(",
        "    return True or all(",
        "tests/canonize/softmaxes/test_parts.py",
        "another",
    ),
    # -- shortcuts
    Mutant(
        "a causal mask shows one key more",
        "rewrite/fused.py",
        "device=mask.device).tril()",
        "device=mask.device).tril(1)",
        "tests/rewrite/test_fast.py",
        "causal",
    ),
    Mutant(
        "values of fused attention get a quarter",
        "rewrite/fused.py",
        "shares = (1 / through, 1 / through, 1 / ways[node])",
        "shares = (1 / through, 1 / through, 1 / through)",
        "tests/rewrite/test_fast.py",
        "test_attention",
    ),
    Mutant(
        "the fast form drops every term but the first",
        "rules/terms.py",
        "return [t.add_(c, alpha=gate) for t, c in zip(total, found, strict=True)]",
        "return total",
        "tests/rewrite/test_fast.py",
        "convolutional and residual",
    ),
    Mutant(
        "the fast form of gamma forgets a summand",
        "rules/affine.py",
        "d.mul_(-g).add_(n, alpha=1 + g)",
        "d.mul_(-g).add_(n)",
        "tests/rewrite/test_fast.py",
        "convolutional and residual and GammaBox",
    ),
    Mutant(
        "the fast form of the stabilizer is off by a thousandth",
        "rules/base.py",
        "torch.div(size.new_tensor(stabilizer), size).add_(1))",
        "torch.div(size.new_tensor(stabilizer), size).add_(1.001))",
        "tests/rewrite/test_fast.py",
        "convolutional and residual",
    ),
    Mutant(
        "a fast activation takes its slope for its secant",
        "rules/pointwise.py",
        "(times(torch.where(a == 0, slope, ratio), m),)",
        "(times(slope.expand_as(a), m),)",
        "tests/rewrite/test_fast.py",
        "test_attention",
    ),
    # -- the backward pass, layers, targets, the ledger
    Mutant(
        "rules read detached activations",
        "rewrite/twins.py",
        "step.reads_output else None, *tensors)",
        "step.reads_output else None, *(t.detach() for t in tensors))",
        "tests/rules/test_derivatives.py",
        "central",
    ),
    Mutant(
        "a tap takes the node after the batch norm",
        "rewrite/taps.py",
        "return Tap(node if last else stages[-1], node)",
        "return Tap(node, node)",
        "tests/rewrite/test_taps.py",
    ),
    Mutant(
        "the seed is of the class before",
        "run/targets.py",
        "mask[torch.arange(len(classes), device=output.device), classes] = True",
        "mask[torch.arange(len(classes), device=output.device), classes - 1] = True",
        "tests/run/test_targets.py",
        "test_seed",
    ),
    Mutant(
        "of several targets all get the first's relevance",
        "run/backward.py",
        "torch.zeros_like(e) if g is None else g[k]",
        "torch.zeros_like(e) if g is None else g[0]",
        "tests/run/test_targets.py",
        "targets",
    ),
    Mutant(
        "the ledger forgets the bias",
        "rules/terms.py",
        'absorbed["bias"] = absorbed["bias"] + sum_all([share])',
        "pass",
        ORACLE,
        "ledger_closes",
    ),
    Mutant(
        "the ledger forgets what a softmax keeps",
        "rules/bilinear.py",
        'return {"softmax": sum_all([R]) - sum_all([R_x])}',
        "return {}",
        "tests/capture/test_families.py",
        "ledger and bert",
    ),
    # -- what is left behind, and what must be said
    Mutant(
        "a hook stays on the model",
        "engine.py",
        "self.state = State(",
        "self.captured.model.register_forward_hook(lambda *_: None)\n        self.state = State(",
        "tests/capture/test_preserve.py",
        "alone",
    ),
    Mutant(
        "numpy's random state moves on",
        "capture/preserve.py",
        "np.random.set_state(states[2])",
        "pass",
        "tests/capture/test_preserve.py",
        "alone",
    ),
    Mutant(
        "an attribute that forward() makes stays",
        "capture/preserve.py",
        "        del mapping[key]",
        "        pass",
        "tests/test_errors.py",
        "leaves_the_model_alone",
    ),
    Mutant(
        "a graph that computes something else is taken",
        "capture/checks/faithful.py",
        "if not worst <= 1.0:",
        "if not worst <= 1e9:",
        "tests/test_errors.py",
        "what_where and capture",
    ),
    Mutant(
        "an entry that names nothing is passed over",
        "plan/assign.py",
        "    if not matched:",
        "    if False:",
        "tests/test_errors.py",
        "what_where and selector",
    ),
    Mutant(
        "round-off decides which samples are best",
        "concepts/accumulate.py",
        "first - own > tie * np.abs(first)",
        "first - own > 0",
        "tests/concepts/test_scan.py",
        "however_samples_are_parted",
    ),
    Mutant(
        "a part that was interrupted begins anew",
        "concepts/work.py",
        "            found = Accumulator.load(store.shard(part), self.k, self.layers, self.tie)\n",
        "            pass\n",
        "tests/concepts/test_engines.py",
        "goes_on_in_its_middle",
    ),
    Mutant(
        "a scan that is interrupted keeps nothing of its part",
        "concepts/work.py",
        "        finally:\n            keep()",
        "        finally:\n            reached == end and keep()",
        "tests/concepts/test_engines.py",
        "goes_on_in_its_middle",
    ),
    Mutant(
        "names are not escaped on the page of a scan",
        "concepts/page.py",
        "    return html.escape(str(value))",
        "    return str(value)",
        "tests/concepts/test_page.py",
        "escapes_names",
    ),
    Mutant(
        "a receptive field forgets dilation",
        "conditions/fields.py",
        "    wide = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]",
        "    wide = [k - 1 for d, k in zip(dilation, kernel, strict=True)]",
        "tests/conditions/test_fields.py",
        "outside_of_a_field",
    ),
    # -- attributors and measures
    Mutant(
        "the opposite order is the same",
        "evaluate/erasing.py",
        "        both = turns, number - 1 - turns\n",
        "        both = turns, turns\n",
        "tests/evaluate/test_perturbation.py",
        "loop_in_numpy",
    ),
    Mutant(
        "the area between curves changes its sign with the order",
        "evaluate/curves.py",
        'return -gain if self.order == "least" else gain',
        "return gain",
        "tests/evaluate/test_perturbation.py",
        "loop_in_numpy",
    ),
    Mutant(
        "one part more is erased than was asked for",
        "evaluate/erasing.py",
        "turns[job.curve] < job.erased for",
        "turns[job.curve] <= job.erased for",
        "tests/evaluate/test_perturbation.py",
        "loop_in_numpy",
    ),
    Mutant(
        "negative relevance counts as mass",
        "evaluate/masks.py",
        "positive = r.clamp(min=0)",
        "positive = r.abs()",
        "tests/evaluate/test_metrics.py",
        "loop_in_numpy",
    ),
    Mutant(
        "of equal entries all are inside",
        "evaluate/masks.py",
        "by_chance = open_places * chance",
        "by_chance = open_places",
        "tests/evaluate/test_metrics.py",
        "as_by_chance",
    ),
    Mutant(
        "agreement forgets the sign",
        "evaluate/ranks.py",
        "same = both & (first.sign() == second.sign())",
        "same = both",
        "tests/evaluate/test_metrics.py",
        "agreement",
    ),
    Mutant(
        "layers become random one by one only",
        "evaluate/sanity.py",
        'if order == "independent":',
        "if True:",
        "tests/evaluate/test_randomization.py",
        "cascading",
    ),
    Mutant(
        "intervals draw samples and no runs",
        "evaluate/statistics.py",
        "generator.integers(runs, size=runs)",
        "np.arange(runs)",
        "tests/evaluate/test_metrics.py",
        "intervals_of_runs",
    ),
    Mutant(
        "windows that overlap count twice",
        "attributors/windows.py",
        "relevance[i] = sums[i] / counts[i]",
        "relevance[i] = sums[i]",
        "tests/attributors/test_occlusion.py",
        "loop_by_hand",
    ),
]


def planted(mutant: Mutant, root: Path) -> str:
    """The mutated text of its file.

    Raises:
        SystemExit: What the fault stands in place of is not there exactly once.
    """
    text = (root / "lrpfx" / mutant.file).read_text()
    if (times := text.count(mutant.old)) != 1:
        raise SystemExit(
            f"{mutant.name}: its text stands {times} times in lrpfx/{mutant.file}, not once.\n"
            f"Write the fault anew in tests/mutants.py:\n{mutant.old}"
        )
    return text.replace(mutant.old, mutant.new)


def begin(root: Path, tests: str, only: str, says: Path) -> BaseProcess:
    """Start the fast suite's tests of a file, up to the first that fails; it ends as pytest does.

    Args:
        root: The copy.
        tests: The test file.
        only: As pytest's ``-k``.
        says: Where its output goes.
    """
    # A fork of what has torch and the others imported takes seconds less, and lrpfx is not of them.
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(root, tests, only, says), name=f"{tests} -k {only!r}"
    )
    process.start()
    return process


def _run(root: Path, tests: str, only: str, says: Path) -> None:
    os.chdir(root)
    sys.dont_write_bytecode = True  # files change faster than their times tell
    for name in [name for name in sys.modules if name.split(".")[0] in PARTS]:
        del sys.modules[name]
    sys.path[:] = [str(root), *(path for path in sys.path if path not in ("", str(ROOT)))]
    with says.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        options = ["-x", "-p", "no:cacheprovider", *(["-k", only] if only else [])]
        os._exit(pytest.main([*options, tests]))


def import_others() -> None:
    """What the tests import beside lrpfx."""
    declare_missing_ops()
    for name in ("einops", "hypothesis.extra.numpy", "matplotlib.pyplot", "torch.export"):
        importlib.import_module(name)
    for name in ("torchvision", "transformers.models.llama", "zennit.torchvision"):
        importlib.import_module(name)


def each(
    roots: list[Path], cases: Iterable[tuple[Mutant, str]]
) -> Iterator[tuple[Mutant, int | None, str]]:
    """Run the tests of cases, a mutant and the text of its file each, in all copies at a time.

    Yields:
        The mutant, how pytest ended, and what it said, in the order in which they end.
    """
    free, running = list(roots), {}
    todo = deque(cases)
    while todo or running:
        while todo and free:
            root, (mutant, text) = free.pop(), todo.popleft()
            file = root / "lrpfx" / mutant.file
            original = file.read_text()
            file.write_text(text)
            process = begin(root, mutant.tests, mutant.only, root / "says")
            running[process.sentinel] = root, mutant, process, original
        for sentinel in wait(list(running)):
            root, mutant, process, original = running.pop(sentinel)
            process.join()
            (root / "lrpfx" / mutant.file).write_text(original)
            free.append(root)
            yield mutant, process.exitcode, (root / "says").read_text()


def table() -> str:
    """The faults as CONTRIBUTING lists them."""
    rows = [f"| {m.name} | `lrpfx/{m.file}` | `{m.tests}` |" for m in MUTANTS]
    return "\n".join(["| fault | planted in | seen by |", "| --- | --- | --- |", *rows])


def chosen(words: list[str]) -> Iterator[Mutant]:
    """The faults whose names have one of the words; all without any."""
    for mutant in MUTANTS:
        if not words or any(word in mutant.name for word in words):
            yield mutant


def main(words: list[str]) -> int:
    """Plant the faults one after the other; 1 if one is not seen."""
    if words == ["--table"]:
        print(table())
        return 0
    mutants, unseen = list(chosen(words)), []
    cases = [(mutant, planted(mutant, ROOT)) for mutant in mutants]
    # Without a fault they pass: what fails below fails because of it.
    sound = {(m.tests, m.only): (m, (ROOT / "lrpfx" / m.file).read_text()) for m in mutants}
    import_others()
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder).resolve() / str(k) for k in range(min(2, os.cpu_count() or 1))]
        for root in roots:
            root.mkdir()
            for part in PARTS:
                source = ROOT / part
                copy = shutil.copytree if source.is_dir() else shutil.copy
                copy(source, root / part)
        for mutant, end, said in each(roots, sound.values()):
            if end != 0:
                print(said[-2000:], f"{mutant.tests} -k {mutant.only!r} fails as it is", sep="\n")
                return 1
        for mutant, end, said in each(roots, cases):
            seen = end == 1  # a test has failed; other numbers are no verdict
            print("seen    " if seen else "NOT SEEN", mutant.name, flush=True)
            if not seen:
                unseen.append(mutant.name)
                print(said[-1000:])
    print(f"{len(mutants) - len(unseen)} of {len(mutants)} faults are seen")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
