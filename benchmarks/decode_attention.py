"""One layer's decode attention: HATA beside dense FlashInfer, on one GPU in one run.

    python -m benchmarks.decode_attention

Every result is checked against the specification before it is timed; a wrong one stops the benchmark. A CUDA graph
runs the step over as many layers as it takes for each to find the caches cold, as between the layers of a model, and
is replayed; times are medians for one layer. Beside each stands its floor: the fewest bytes that the step must read
(codes, selected keys and values) over the GPU's memory bandwidth, measured in the same run.

Attention is timed once more as a server runs it, between the matrix products of a model's layers: what they add to the
products alone. Then no launch starts during the layer before, and what all layers read is in no cache either.

Writes benchmarks/results/decode_attention-GPU.json and a plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import header, memory_bandwidth, plot, result_path, write_rows
from hata_kernels import attend, encode, plan, reference, score, topk
from hata_kernels.decode import hata_decode_step
from hata_kernels.reference import Budget
from hata_kernels.workspace import SLOT_BITS, DecodeWorkspace
from sglang_hata.config import HataConfig

SINK, RECENT = HataConfig.sink, HataConfig.recent
COLD_BYTES = 256 * 2**20  # read between two visits of the same layer: five times the L2 cache of an H100
REPLAYS = 30
POOL_BYTES = 40 * 2**30
# Inputs and outputs of what lies between the attention of two layers of Llama-3.1-8B: the output projection, the MLP's
# two products, and the next layer's queries, keys and values. So many layers have weights of their own.
PRODUCTS, PRODUCT_LAYERS = ((4096, 4096), (4096, 28_672), (14_336, 4096), (4096, 6144)), 4


class Case(NamedTuple):
    """A batch of equally long contexts."""

    context: int
    batch: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    bits: int = 128
    budget: str = "1/64"
    scoring: str = reference.HAMMING
    selection: str = reference.SAMPLED
    sized: bool = False

    @property
    def kept(self) -> int:
        """Tokens that a KV head attends to."""
        return self.rule.of(self.context)

    @property
    def rule(self) -> Budget:
        share, _, whole = self.budget.partition("/")
        if whole:
            return Budget(share_ppm=1_000_000 * int(share) // int(whole), floor=SINK + RECENT)
        return Budget(tokens=int(share), floor=SINK + RECENT)

    def bytes_read(self, share: float = 1.0) -> int:
        """Bytes of the keys and values of a share of the context."""
        return int(2 * 2 * self.head_dim * self.kv_heads * self.batch * self.context * share)

    @property
    def floor_bytes(self) -> int:
        """Bytes of all codes and sizes, where there is something to select, and of the selected keys and values."""
        scored = self.kv_heads * self.batch * self.context * (self.kept < self.context)
        return (self.bits // 8 + 2 * self.sized) * scored + self.bytes_read(self.kept / self.context)


TABLE = [
    Case(32_768, 1),
    Case(131_072, 1),
    Case(262_144, 1),
    Case(32_768, 8),
    Case(131_072, 8),
    Case(32_768, 8, kv_heads=32),
]
GROWTH = [Case(context, 1) for context in (4096, 8192, 16_384, 65_536, 524_288, 1_048_576)]
FORMS = [
    *(Case(context, batch, selection=reference.TOP) for context, batch in ((131_072, 1), (32_768, 8), (131_072, 8))),
    Case(32_768, 8, kv_heads=32, selection=reference.TOP),
    Case(32_768, 8, bits=64),
    Case(32_768, 8, bits=256),
    Case(32_768, 8, scoring=reference.ONE_SIDED),
    Case(131_072, 8, scoring=reference.ONE_SIDED),
    Case(131_072, 1, scoring=reference.ONE_SIDED),
    *(Case(*cut, scoring=reference.ONE_SIDED, sized=True) for cut in ((32_768, 8), (131_072, 8), (131_072, 1))),
    Case(32_768, 8, bits=64, scoring=reference.ONE_SIDED),
    Case(32_768, 8, q_heads=14, kv_heads=2, head_dim=64),
    Case(32_768, 8, q_heads=64, kv_heads=8),
    Case(32_768, 8, q_heads=32, kv_heads=2),
    Case(32_768, 8, budget="2048"),
    Case(32_768, 8, budget="8192"),
]
# Nothing is selected: what it costs to have HATA turned on.
WHOLE = [
    Case(context, batch, budget=str(context))
    for context, batch in ((1024, 1), (1024, 8), (1024, 32), (1024, 64), (4096, 1), (2048, 32))
]
CASES = {"table": TABLE, "growth": GROWTH, "forms": FORMS, "whole": WHOLE}


@dataclass
class Layers:
    """As many layers of a model as it takes to keep the caches cold, and a batch of queries."""

    case: Case
    k_pools: list[Tensor]
    v_pools: list[Tensor]
    codes: list[Tensor]
    sizes: list[Tensor | None]
    projection: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    slot_table: Tensor
    rows: Tensor
    lengths: Tensor
    loc: Tensor
    workspace: DecodeWorkspace
    out: Tensor

    @classmethod
    def random(cls, case: Case, scattered: bool) -> Layers:
        generator = torch.Generator("cuda").manual_seed(case.context + case.batch)
        B, L, H, D = case.batch, case.context, case.kv_heads, case.head_dim
        slots = B * L + 1
        n = -(-COLD_BYTES // case.floor_bytes)
        n = max(2, min(n, 32, POOL_BYTES // (4 * slots * H * D)))
        normal = partial(torch.randn, device="cuda", dtype=torch.bfloat16, generator=generator)
        order = torch.arange(B * L, device="cuda")
        if scattered:
            order = torch.randperm(B * L, device="cuda", generator=generator)
        projection = torch.randint(
            -128, 128, (2, H, D, case.bits), dtype=torch.int8, device="cuda", generator=generator
        )
        k_pools = [normal(slots, H, D) for _ in range(n)]
        codes, sizes = [], []
        for pool in k_pools:
            out = torch.empty((slots, H, case.bits // 32), dtype=torch.int32, device="cuda")
            sizes.append(torch.empty((slots, H), dtype=torch.int16, device="cuda") if case.sized else None)
            codes.append(encode.hash_rows(pool, projection[reference.KEYS], out, sizes=sizes[-1]))
        slot_table = (order + 1).view(B, L).int()
        return cls(
            case=case,
            k_pools=k_pools,
            v_pools=[normal(slots, H, D) for _ in range(n)],
            codes=codes,
            sizes=sizes,
            projection=projection,
            q=normal(B, case.q_heads, D),
            k=normal(B, H, D),
            v=normal(B, H, D),
            slot_table=slot_table,
            rows=torch.arange(B, device="cuda"),
            lengths=torch.full((B,), L, device="cuda"),
            loc=slot_table[:, -1].long(),
            workspace=DecodeWorkspace.allocate(
                max_batch=B,
                q_heads=case.q_heads,
                kv_heads=H,
                head_dim=D,
                bits=case.bits,
                max_context=L,
                max_kept=case.rule.largest(L),
                device="cuda",
                scoring=case.scoring,
                selection=case.selection,
            ),
            out=torch.empty((B, case.q_heads, D), dtype=torch.bfloat16, device="cuda"),
        )

    @property
    def scale(self) -> float:
        return self.case.head_dim**-0.5

    def plan(self) -> None:
        plan.plan_step(self.lengths, self.rows, self.workspace, self.case.rule)

    def step(self, i: int) -> None:
        pools = self.k_pools[i], self.v_pools[i], self.codes[i]
        hata_decode_step(
            self.q,
            self.k,
            self.v,
            *pools,
            self.projection,
            self.slot_table,
            self.loc,
            self.workspace,
            sink=SINK,
            recent=RECENT,
            scale=self.scale,
            out=self.out,
            size_cache=self.sizes[i],
        )

    def stages(self) -> dict[str, Callable[[int], Any]]:
        """The launches of a step, in their order."""
        w, table, B = self.workspace, self.slot_table, self.case.batch
        return {
            "hash": lambda i: encode.hash_decode_step(
                self.q,
                self.k,
                self.v,
                self.projection,
                self.k_pools[i],
                self.v_pools[i],
                self.codes[i],
                self.loc,
                w,
                size_cache=self.sizes[i],
            ),
            "score": lambda i: score.score_and_count(
                self.codes[i], table, w, B, sink=SINK, recent=RECENT, size_cache=self.sizes[i]
            ),
            "select": lambda _: topk.select_slots(table, w, B),
            "attend": lambda i: attend.attend(self.q, self.k_pools[i], self.v_pools[i], table, w, self.scale, self.out),
        }

    def stage_times(self, products: Products | None = None) -> dict[str, float]:
        """What each stage adds to those before it, so that the launches overlap as they do in a step."""
        times: dict[str, float] = {}
        launches: list[Callable[[int], Any]] = []
        for name, launch in self.stages().items():
            launches.append(launch)

            def so_far(i: int, launches: tuple[Callable[[int], Any], ...] = tuple(launches)) -> None:
                for each in launches:
                    each(i)

            times[name] = microseconds(so_far, len(self.k_pools), products) - sum(times.values())
        return times

    def dense(self) -> Iterator[Callable[[int], Any]]:
        """Dense attention as SGLang asks FlashInfer for it, on CUDA cores and on tensor cores."""
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        case, B = self.case, self.case.batch
        indptr = torch.arange(B + 1, device="cuda", dtype=torch.int32) * case.context
        ones = torch.ones(B, device="cuda", dtype=torch.int32)
        group = case.q_heads // case.kv_heads
        for tensor_cores in (False, True):
            if not tensor_cores and group not in (1, 2, 4, 8):
                continue  # FlashInfer has no such kernel
            wrapper = BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(2**29, dtype=torch.uint8, device="cuda"),
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=tensor_cores,
                paged_kv_indptr_buffer=indptr.clone(),
                paged_kv_indices_buffer=self.slot_table.flatten().clone(),
                paged_kv_last_page_len_buffer=ones.clone(),
            )
            wrapper.plan(
                indptr,
                self.slot_table.flatten(),
                ones,
                case.q_heads,
                case.kv_heads,
                case.head_dim,
                1,
                q_data_type=torch.bfloat16,
                kv_data_type=torch.bfloat16,
                sm_scale=self.scale,
            )
            yield lambda i, wrapper=wrapper: wrapper.run(
                self.q, (self.k_pools[i].unsqueeze(1), self.v_pools[i].unsqueeze(1)), out=self.out
            )

    def check(self) -> None:
        """Raise AssertionError unless the step of the first layer is the specification's."""
        self.plan()
        self.out.fill_(float("nan"))
        self.step(0)
        case, b = self.case, self.case.batch - 1
        H = case.kv_heads
        weights = reference.query_weights(self.q[b : b + 1], self.projection[reference.QUERIES], case.scoring)[0]
        planes = reference.query_planes(weights, reference.magnitudes(case.q_heads // H, case.scoring))
        slots = self.slot_table[b].long()
        octaves = reference.octaves(weights)
        draws = case.selection == reference.SAMPLED and case.kept < case.context
        lucky = reference.luck(case.context, 0, "cuda") * draws
        for h in range(H):
            codes = self.codes[0][slots, h : h + 1]
            distance = reference.distances(planes[h : h + 1], codes)
            total = weights[h : h + 1].abs().sum(-1, dtype=torch.int32)
            if (sizes := self.sizes[0]) is not None:
                relative = reference.relative_sizes(sizes[slots, h : h + 1])
                distance = reference.stretch(distance, total, relative)
            ranks = reference.rank(distance, SINK, RECENT, self.workspace.bins, total)
            drawn = reference.draw(ranks, lucky, octaves[h : h + 1])
            positions = reference.select_positions(drawn, case.kept)
            doubled = reference.doublings(drawn, lucky, octaves[h : h + 1], positions)
            chosen = slots[positions]
            if case.kept < case.context:
                found = self.workspace.slots[b * H + h, : case.kept]
                assert torch.equal(found, (doubled[0] << SLOT_BITS) + chosen[0].int()), (
                    f"{case}: KV head {h} selects other tokens than the specification"
                )
            group = slice(h * case.q_heads // H, (h + 1) * case.q_heads // H)
            keys, values = (pool[0][chosen, h] for pool in (self.k_pools, self.v_pools))
            expected = reference.attend(self.q[b, group].float(), keys, values, self.scale, doubled)
            error = (self.out[b, group].float() - expected).norm() / expected.norm()
            assert error < 1e-2, f"{case}: relative error {error:.1e} of KV head {h}'s attention"


class Products:
    """The matrix products between the attention of two layers of a model."""

    def __init__(self, batch: int) -> None:
        normal = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        self.inputs = [normal(batch, size) for size, _ in PRODUCTS]
        self.weights = [[normal(out, size) for size, out in PRODUCTS] for _ in range(PRODUCT_LAYERS)]

    def __call__(self, i: int) -> None:
        for x, weight in zip(self.inputs, self.weights[i % PRODUCT_LAYERS], strict=True):
            torch.nn.functional.linear(x, weight)


def graph_of(layers: int, *work: Callable[[int], Any]) -> torch.cuda.CUDAGraph:
    for each in work:
        each(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(layers):
            for each in work:
                each(i)
    return graph


def microseconds(work: Callable[[int], Any], layers: int, products: Products | None = None) -> float:
    """Median time of one layer, over replays of a graph of all of them; with ``products``, what it adds to them."""
    graphs = [graph_of(layers, work)]
    if products is not None:
        graphs = [graph_of(layers, products, work), graph_of(layers, products)]
    times: list[list[float]] = [[] for _ in graphs]
    for replay in range(REPLAYS + 3):
        for graph, of_graph in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= 3:
                of_graph.append(start.elapsed_time(end) * 1e3 / layers)
    with_work, *without = map(statistics.median, times)
    return with_work - sum(without)


def measure(case: Case, bandwidth: float, scattered: bool, dense: bool) -> dict[str, Any]:
    """A row of the results. ``bandwidth`` is in bytes a microsecond."""
    layers = Layers.random(case, scattered)
    layers.check()
    n = len(layers.k_pools)
    hata = microseconds(layers.step, n)
    stages = layers.stage_times() | {"plan": microseconds(lambda _: layers.plan(), n)}
    products = Products(case.batch)
    in_model = {"hata": microseconds(layers.step, n, products)}
    stages_in_model = layers.stage_times(products)
    dense_us = None
    if dense:
        dense_us = min(microseconds(work, n) for work in layers.dense())
        in_model["dense"] = min(microseconds(work, n, products) for work in layers.dense())
    return {
        **case._asdict(),
        "kept": case.kept,
        "slots": "scattered" if scattered else "in order",
        "dense_us": dense_us,
        "hata_us": hata,
        "ratio": dense_us / hata if dense_us else None,
        "bandwidth_tb_s": bandwidth / 1e6,
        "floor_us": case.floor_bytes / bandwidth,
        "dense_floor_us": case.bytes_read() / bandwidth,
        "bytes": {"dense": case.bytes_read(), "hata": case.floor_bytes},
        "stages_us": stages,
        "in_model_us": in_model,
        "stages_in_model_us": stages_in_model,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        choices=(*CASES, "all"),
        default="all",
        help="table: the README's; growth: 4K to 1M tokens; forms: other heads, codes and budgets; whole: nothing is "
        "selected (default: all)",
    )
    parser.add_argument("--scattered", action="store_true", help="slots in random order, not as first allocated")
    parser.add_argument("--no-dense", action="store_true", help="leave out dense attention (and FlashInfer)")
    args = parser.parse_args()
    cases = [case for name in CASES if args.cases in (name, "all") for case in CASES[name]]
    bandwidth = memory_bandwidth() / 1e6
    report = header("decode_attention") | {"rows": []}
    path = result_path("decode_attention", report["gpu"])
    print(f"{report['gpu']}, one layer, memory bandwidth {bandwidth / 1e6:.2f} TB/s")
    print(
        "context batch  heads  D bits budget score     select  |"
        "  dense    HATA  ratio  floor |  hash score select attend  plan | in a model:  dense    HATA"
    )
    for case in cases:
        row = measure(case, bandwidth, args.scattered, not args.no_dense)
        report["rows"].append(row)
        stages = " ".join(f"{row['stages_us'][name]:6.1f}" for name in ("hash", "score", "select", "attend", "plan"))
        dense, ratio = row["dense_us"] or float("nan"), row["ratio"] or float("nan")
        form = f"{case.q_heads:3}/{case.kv_heads:<2} {case.head_dim:3} {case.bits:4} {case.budget:>6} "
        form += f"{case.scoring:9} {'sized' if case.sized else case.selection:7}"
        times = f"{dense:6.1f} {row['hata_us']:7.1f} {ratio:6.2f} {row['floor_us']:6.1f}"
        in_model = f"{row['in_model_us'].get('dense', float('nan')):18.1f} {row['in_model_us']['hata']:7.1f}"
        print(f"{case.context:7} {case.batch:5} {form} | {times} | {stages} | {in_model}", flush=True)
        if not args.no_dense:  # after every case: a run that is cut short has lost nothing
            write_rows(path, report, lambda row: tuple(row[name] for name in (*Case._fields, "slots")))
        torch.cuda.empty_cache()
    if args.no_dense:
        return
    print(path)
    draw(json.loads(path.read_text()))  # with the rows of earlier runs


def draw(report: dict[str, Any]) -> None:
    """Times over the context of one request, by stage, and the floor: what grows as bytes do is parallel to it."""
    rows = sorted(
        (r for r in report["rows"] if Case(r["context"], 1) == Case(*(r[name] for name in Case._fields))),
        key=lambda row: row["context"],
    )
    if len(rows) < 2:
        return
    contexts = [row["context"] for row in rows]
    with plot(result_path("decode_attention", report["gpu"], ".png")) as axes:
        axes.plot(contexts, [row["dense_us"] for row in rows], "k-o", label="dense FlashInfer")
        axes.plot(contexts, [row["hata_us"] for row in rows], "C0-o", label="HATA, budget 1/64")
        axes.plot(contexts, [row["floor_us"] for row in rows], "C0:", label="HATA's floor")
        for i, name in enumerate(("hash", "score", "select", "attend")):
            axes.plot(contexts, [row["stages_us"][name] for row in rows], f"C{i + 1}--", linewidth=1, label=name)
        axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="one layer's attention (µs)")
        axes.set_title(f"{report['gpu']}: 32 query heads, 8 KV heads, head_dim 128, batch 1")
        axes.set_xticks(contexts, [f"{context // 1024}K" for context in contexts])
        axes.set_xticks([], minor=True)
        axes.figure.legend(loc="outside lower center", ncols=4, frameon=False)


if __name__ == "__main__":
    main()
