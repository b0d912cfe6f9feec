"""A plan as a picture: every GPU and every rank once, in three forms."""

from __future__ import annotations

from io import BytesIO, StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from dynamo_ray.cli.drawing import png, save, svg, terminal
from dynamo_ray.cli.picture import MAX_LINES, Picture, Slot, Use, draw
from placement.cluster_file import read_topology
from placement.parallelism import Parallelism
from placement.plan import Bundle, WorkerGroup, WorkerPlacement, plan
from placement.topology import Node, Resources, Topology

ROLES = {"prefill": "prefill", "decode": "decode", "agg": "aggregated"}
RECT = "{http://www.w3.org/2000/svg}rect"


def node(name: str, gpus: int = 4, held: int = 0, leaf: str = "", domain: str = "", drained: bool = False) -> Node:
    free, total = Resources(64.0, gpus - held), Resources(64.0, gpus)
    return Node(name, name, free, total, "H100" if gpus else "cpu", domain=domain, leaf=leaf, drained=drained)


def worker(name: str, homes: dict[str, int], gpus: bool = True) -> WorkerPlacement:
    """Homes: how many ranks are on which node."""
    bundles, first = [], 0
    for node_rank, (home, count) in enumerate(homes.items()):
        ranks = tuple(range(first, first + count))
        bundles.append(Bundle(node_rank, home, home, Resources(1.0, count if gpus else 0), ranks))
        first += count
    return WorkerPlacement(name, name.rsplit("-", 1)[0], tuple(bundles))


def deepseek_r1() -> tuple[Picture, tuple[WorkerPlacement, ...]]:
    topology = read_topology("13x8xH100")
    groups = [
        WorkerGroup("prefill", 1, 4, Parallelism(attn_dp=32, moe_ep=32), accelerator="H100"),
        WorkerGroup("decode", 1, 9, Parallelism(attn_dp=72, moe_ep=72), accelerator="H100"),
    ]
    workers = plan(topology, groups).workers
    return draw(topology, workers, ROLES, title="DeepSeek-R1, 4P+9D"), workers


def small() -> Picture:
    """One node of each kind: shared, partly held, drained, spare, and without GPUs."""
    nodes = (
        node("n0", leaf="rack-a"),
        node("n1", held=1, leaf="rack-a"),
        node("n2", leaf="rack-b", drained=True),
        node("n3", leaf="rack-b"),
        node("n4", gpus=0, leaf="rack-b"),
    )
    workers = [worker("prefill-0", {"n0": 2}), worker("decode-0", {"n0": 2, "n1": 2})]
    workers.append(worker("agg-0", {"n4": 2}, gpus=False))
    return draw(Topology(nodes), workers, ROLES, spares=["n3"], title="small")


def slots(picture: Picture, label: str) -> str:
    """Of one node, in short: a rank as the worker's first letter and its number, else the use."""
    found = next(node for block in picture.blocks for node in block.nodes if node.label == label)
    return " ".join(f"{slot.worker[0]}{slot.rank}" if slot.worker else slot.use.name.lower() for slot in found.gpus)


def shown(picture: Picture, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(terminal(picture))
    file = console.file
    assert isinstance(file, StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def rects(picture: Picture, kind: str) -> list[ElementTree.Element]:
    return [rect for rect in ElementTree.fromstring(svg(picture)).iter(RECT) if rect.get("class") == kind]


def test_deepseek_r1_fills_13_nodes_and_each_rank_has_the_gpu_of_its_node() -> None:
    picture, workers = deepseek_r1()
    (block,) = picture.blocks
    drawn = {node.label: node.gpus for node in block.nodes}
    assert len(drawn) == 13
    for placed in workers:
        for bundle in placed.bundles:
            role = ROLES[placed.group]
            assert drawn[bundle.address] == tuple(Slot(Use.RANK, placed.worker, role, rank) for rank in bundle.ranks)
    ranks = sorted((slot.role, slot.rank) for gpus in drawn.values() for slot in gpus)
    assert ranks == [("decode", rank) for rank in range(72)] + [("prefill", rank) for rank in range(32)]


def test_a_node_shows_the_plans_workers_in_order_then_idle_gpus_then_those_of_others() -> None:
    picture = small()
    assert slots(picture, "n0") == "p0 p1 d0 d1"
    assert slots(picture, "n1") == "d2 d3 free held"
    assert slots(picture, "n2") == "drained drained drained drained"
    assert slots(picture, "n3") == "spare spare spare spare"


def test_a_drained_node_still_shows_who_holds_its_gpus() -> None:
    assert slots(draw(Topology((node("n0", held=3, drained=True),)), (), {}), "n0") == "drained held held held"


def test_ranks_on_cores_are_drawn_beside_the_gpus() -> None:
    (cpu_node,) = [node for block in small().blocks for node in block.nodes if node.label == "n4"]
    assert cpu_node.gpus == ()
    assert [slot.rank for slot in cpu_node.cpu_ranks] == [0, 1]
    assert len(rects(small(), "rank")) == 2


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_each_gpu_of_any_cluster_is_drawn_once(kinds: list[tuple[int, int, bool, bool]]) -> None:
    nodes = [
        node(f"n{index}", gpus, min(held, gpus), leaf=f"leaf-{index % 3}", drained=drained)
        for index, (gpus, held, drained, _) in enumerate(kinds)
    ]
    homes = {made.node_id: made.free.gpus for made, kind in zip(nodes, kinds, strict=True) if kind[3] and kind[0]}
    placed = worker("decode-0", homes)
    picture = draw(Topology(tuple(nodes)), [placed], ROLES)
    for made in nodes:
        (drawn,) = [node for block in picture.blocks for node in block.nodes if node.label == made.node_id]
        assert len(drawn.gpus) == made.total.gpus
        assert sum(slot.use == Use.HELD for slot in drawn.gpus) == made.total.gpus - made.free.gpus
    ranks = [slot.rank for block in picture.blocks for node in block.nodes for slot in node.gpus if slot.worker]
    assert sorted(ranks) == list(range(sum(homes.values())))
    for text in (svg(picture), shown(picture)):
        assert f"{sum(made.total.gpus for made in nodes)} GPU" in text


def test_the_terminal_shows_a_block_a_leaf_a_line_a_node_and_a_legend() -> None:
    expected = """\
small
5 nodes, 16 GPUs: 2 prefill, 4 decode, 1 free, 4 spare, 4 drained, 1 held by others, 2 ranks on CPU
cores
╭─ rack-a, 2 nodes x 4 H100 ──────────╮ ╭─ rack-b, 2 nodes x 4 H100, 1 node without GPUs ─╮
│ n0  0  1  0  1  prefill-0, decode-0 │ │ n2  -  -  -  -  drained                         │
│ n1  2  3  .  x  decode-0            │ │ n3  +  +  +  +  spare                           │
╰─────────────────────────────────────╯ │ n4  0  1        agg-0                           │
                                        ╰─────────────────────────────────────────────────╯
prefill
    prefill-0: 2 ranks on 1 node
decode
    decode-0: 4 ranks on 2 nodes
aggregated
    agg-0: 2 ranks on 1 node, on CPU cores
no rank of this plan
 .  free: 1 GPU   +  spare: 4 GPUs   -  drained: 4 GPUs   x  held by others: 1 GPU
"""
    assert shown(small()) == expected.strip()


def test_72_gpu_racks_stand_side_by_side_in_100_columns() -> None:
    lines = shown(draw(read_topology("36x4xGB200@nvl72"), (), {})).splitlines()
    assert any("node-00" in line and "node-18" in line for line in lines)
    assert max(map(len, lines)) <= 100


def test_blocks_are_leaves_and_nvlink_domains_of_more_than_one_node() -> None:
    nodes = (
        node("n0", leaf="a", domain="x"),
        node("n1", leaf="a", domain="x"),
        node("n2", leaf="a", domain="alone"),
        node("n3", leaf="b"),
    )
    blocks = draw(Topology(nodes), (), {}).blocks
    assert [(b.leaf, b.domain, [n.label for n in b.nodes]) for b in blocks] == [
        ("a", "x", ["n0", "n1"]),
        ("a", "", ["n2"]),
        ("b", "", ["n3"]),
    ]


def test_above_64_nodes_like_nodes_share_a_line_and_what_is_left_out_is_counted() -> None:
    topology = read_topology("100x8xH100/10")
    homes = {f"node-{index:02}": 8 for index in range(12)}
    text = shown(draw(topology, [worker("decode-0", homes)], ROLES, spares=["node-99"]))
    assert "Above 64 nodes, a line is a run of like nodes, and a number counts GPUs or ranks on cores." in text
    assert "Not drawn: 87 nodes, 696 GPUs: 696 free." in text
    assert "node-00 .. node-09 (10)  80  decode-0" in text
    assert "node-10 .. node-11 (2)  16  decode-0" in text
    assert "node-99" in text
    assert "8 spare" in text


def test_a_fleet_of_too_many_lines_is_cut_and_says_so() -> None:
    topology = read_topology(f"{MAX_LINES + 5}x8xH100")
    workers = [worker(f"agg-{index}", {made.node_id: 8}) for index, made in enumerate(topology.nodes)]
    text = shown(draw(topology, workers, ROLES))
    assert "Not drawn: 5 nodes, 40 GPUs: 40 aggregated." in text
    assert "and 109 more workers: 872 ranks" in text


def test_neighbouring_names_that_count_up_are_joined() -> None:
    workers = [worker(name, {"n0": 1}) for name in ("decode-0", "decode-1", "decode-2", "agg-7")]
    assert "decode-0..2, agg-7" in shown(draw(Topology((node("n0"),)), workers, ROLES))


def test_nodes_of_one_address_are_told_apart_by_their_ids() -> None:
    amount = Resources(8.0, 1)
    nodes = tuple(Node(f"{index}" * 56, "127.0.0.1", amount, amount) for index in range(2))
    (block,) = draw(Topology(nodes), (), {}).blocks
    assert [made.label for made in block.nodes] == ["127.0.0.1/00000000", "127.0.0.1/11111111"]


def test_the_svg_has_one_rect_a_gpu_coloured_by_role_and_worker() -> None:
    picture, _ = deepseek_r1()
    gpus = rects(picture, "gpu")
    assert len(gpus) == 104
    assert len({rect.get("fill") for rect in gpus}) == 2
    assert len({(rect.get("x"), rect.get("y")) for rect in gpus}) == 104
    assert "DeepSeek-R1, 4P+9D" in svg(picture)


def test_workers_of_a_role_and_each_use_look_different() -> None:
    nodes = tuple(node(f"n{index}", gpus=8) for index in range(3))
    names = [f"{group}-{index}" for group in ROLES for index in range(2)]
    workers = [worker(name, {f"n{index // 2}": 4}) for index, name in enumerate(names)]
    assert len({rect.get("fill") for rect in rects(draw(Topology(nodes), workers, ROLES), "gpu")}) == 6
    looks = {(rect.get("fill"), rect.get("stroke")) for rect in rects(small(), "gpu")}
    assert len(looks) == len({"prefill", "decode", "free", "held", "drained", "spare"})


def test_names_that_are_markup_or_control_characters_stay_text() -> None:
    picture = draw(Topology((node("<n0 & [red]\x07\n", leaf="a\x1b[2J"),)), (), {}, title="[bold]<&>")
    ElementTree.fromstring(svg(picture))
    assert png(picture)
    text = shown(picture)
    assert all(part in text for part in ("[bold]<&>", "<n0 & [red]??", "a?[2J"))


@pytest.mark.parametrize(
    "picture", [deepseek_r1()[0], small(), draw(Topology(()), (), {})], ids=["r1", "small", "none"]
)
def test_the_png_is_as_large_as_the_svg(picture: Picture) -> None:
    root = ElementTree.fromstring(svg(picture))
    with Image.open(BytesIO(png(picture))) as image:
        assert image.format == "PNG"
        assert image.size == (int(root.attrib["width"]), int(root.attrib["height"]))


def test_all_rects_and_texts_are_inside_the_picture_and_no_gpus_overlap() -> None:
    for picture in (deepseek_r1()[0], small()):
        root = ElementTree.fromstring(svg(picture))
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        boxes = [
            tuple(float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            for rect in root.iter(RECT)
            if rect.get("class") != "panel"
        ]
        assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)
        for index, (x, y, w, h) in enumerate(boxes):
            assert all(abs(x - x2) >= w or abs(y - y2) >= h for x2, y2, _, _ in boxes[index + 1 :])


def test_a_picture_is_saved_as_its_suffix_says(tmp_path: Path) -> None:
    picture = small()
    save(picture, tmp_path / "plan.svg")
    save(picture, tmp_path / "plan.PNG")
    assert (tmp_path / "plan.svg").read_text(encoding="utf-8") == svg(picture)
    assert (tmp_path / "plan.PNG").read_bytes() == png(picture)


@pytest.mark.parametrize("name", ["plan.pdf", "plan"])
def test_another_suffix_is_refused_with_the_two_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        save(small(), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_plan_of_another_cluster_is_refused() -> None:
    topology = Topology((node("n0", held=3),))
    with pytest.raises(ValueError, match="not in the topology: n1, n2"):
        draw(topology, [worker("decode-0", {"n1": 1})], ROLES, spares=["n2"])
    with pytest.raises(ValueError, match="n0: 2 ranks on 1 free GPUs"):
        draw(topology, [worker("decode-0", {"n0": 2})], ROLES)


def test_a_group_without_a_role_is_named() -> None:
    with pytest.raises(ValueError, match="decode: its role must be one of prefill, decode, aggregated; it is None"):
        draw(Topology((node("n0"),)), [worker("decode-0", {"n0": 1})], {})
