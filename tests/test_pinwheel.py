"""The pinwheel (Appendix E): its legs, the flow in the plane, sectors and their matching with arms."""

import json
import math
from itertools import product

import pytest
import torch
from checks import jacobian, randomise

import pinwheel
from flow.prior import Gaussian


def test_points_undo_to_independent_normals():
    x, leg = pinwheel.pinwheel(200_000, torch.Generator().manual_seed(0))
    assert torch.bincount(leg).tolist() == pytest.approx([50_000] * 4, rel=0.03)
    # The radius of a point is that of (u, v), u along the leg; turn it back with u from a fixed-point iteration.
    norm, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    kept = (norm > 0.5) & (norm < 1.5)  # where the iteration contracts
    norm, angle, leg = norm[kept], angle[kept], leg[kept]
    u = norm
    for _ in range(60):
        u = norm * torch.cos(angle - leg * math.pi / 2 - 0.25 * u.exp())
    v = norm * torch.sin(angle - leg * math.pi / 2 - 0.25 * u.exp())
    assert v.std().item() == pytest.approx(0.1, rel=0.02) and abs(v.mean().item()) < 0.002
    # u is normal with deviation 0.3, cut at about half a unit on both sides
    q = torch.linspace(-0.5, 0.5, 10_001)
    weight = torch.exp(-0.5 * (q / 0.3) ** 2)
    assert u.std().item() == pytest.approx(math.sqrt((weight * q * q).sum() / weight.sum()), rel=0.03)


@pytest.mark.parametrize("leg", range(4))
def test_a_point_on_a_line_is_nearest_to_its_arm(leg):
    u = torch.linspace(0.1, 2.2, 40)
    angle = leg * math.pi / 2 + 0.25 * torch.exp(u)
    on_line = torch.stack((u * torch.cos(angle), u * torch.sin(angle)), 1)
    assert (pinwheel.nearest_arm(on_line) == leg).all()
    assert (pinwheel.nearest_arm(on_line @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])) == (leg + 1) % 4).all()


def test_sectors_are_quadrants():
    points = torch.tensor([[1.0, 0.1], [-0.1, 1.0], [-1.0, -0.1], [0.1, -1.0]])
    assert pinwheel.sector(points).tolist() == [0, 1, 2, 3]
    assert pinwheel.sector(points, 45).tolist() == [3, 0, 1, 2]  # about the axes, the one to the right is the last
    assert pinwheel.sector(torch.tensor([[1.0, -1e-20]])).tolist() == [3]


def test_accuracy_is_that_of_the_best_matching():
    sectors = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
    assert pinwheel.matched_accuracy(sectors, (sectors + 1) % 4) == 1
    arms = torch.tensor([2, 2, 1, 1, 0, 3, 3, 1])  # 0 -> 2 (2 of 3), 2 -> 3 (2), then 1 and 3 share arms 0, 1: 1 each
    assert pinwheel.matched_accuracy(sectors, arms) == 6 / 8
    assert pinwheel.matched_accuracy(*torch.randint(4, (2, 100_000))) == pytest.approx(0.25, abs=0.01)


def test_flow_is_a_bijector_with_its_log_det():
    flow = randomise(pinwheel.PlanarFlow("gaussian", nlayers=2, nhidden=8))
    x = torch.randn(5, 2)
    z, log_det = flow(x)
    assert (flow.inverse(z) - x).abs().max() < 1e-10 < 0.1 < (z - x).abs().max()
    for row in range(5):
        matrix = jacobian(lambda value: flow(value)[0], x[row : row + 1])
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(matrix).logabsdet)
    assert matrix[0, 1] != 0 and matrix[1, 0] != 0
    torch.testing.assert_close(flow.log_prob(x), Gaussian().log_prob(z).sum(1) + log_det)


def test_script(tmp_path, capsys):
    argv = f"--seeds 2 --steps 3 --points 500 --fig_dir {tmp_path} --json {tmp_path}/p.json".split()
    pinwheel.main(argv)
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["kind"] == "pinwheel" and record["command"].startswith("python pinwheel.py --seeds 2")
    found = [(row["prior"], row["seed"]) for row in record["results"]]
    assert found == list(product(("gaussian", "laplace"), (0, 1)))
    assert all(0.25 <= row["quadrants"] <= row["best"] <= 1 for row in record["results"])
    assert record["ceiling"] > 0.98
    assert next(tmp_path.glob("pinwheel_seeds_2_*.png")).stat().st_size > 10_000
    assert len(list(tmp_path.glob("pinwheel_*.pdf"))) == 1
    assert "±" in capsys.readouterr().out
    first = pinwheel.train("laplace", 1, 3)
    assert pinwheel.measure(first, 500, 0)["nats"] == record["results"][3]["nats"]  # seeds decide everything
