"""Cached results: computed once per key, again when the file is damaged, never half written."""

import pytest
import torch

from utils.cache import cached, digest


def test_digest_tells_apart_what_differs():
    tensor = torch.arange(6.0)
    values = [(tensor, 1), (tensor, 2), (tensor, "1"), (12, 3), (1, 23), ([tensor, 1],), ([tensor], 1)]
    values += [(other, 1) for other in (tensor.float(), tensor.reshape(2, 3), tensor + 1e-15)]
    values += [({name: tensor}, 1) for name in "ab"]
    assert len({digest(*value) for value in values}) == len(values)
    assert digest({"a": tensor}, 1) == digest({"a": tensor.clone().requires_grad_()}, 1)
    assert digest(tensor.reshape(2, 3).T) == digest(tensor.reshape(2, 3).T.contiguous())


def test_cached(tmp_path):
    results = [torch.rand(50, 50) for _ in range(4)]
    path, remaining = tmp_path / "folder" / "x.cache", iter(results)
    assert all(torch.equal(cached(path, remaining.__next__), results[0]) for _ in range(2))
    whole = path.read_bytes()
    for number, damaged in enumerate((whole[:-100], whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:], b""), 1):
        path.write_bytes(damaged)
        assert torch.equal(cached(path, remaining.__next__), results[number])
    assert [each.name for each in path.parent.iterdir()] == ["x.cache"]
    with pytest.raises(OSError, match=tmp_path.name):  # told before computing
        cached(tmp_path, lambda: pytest.fail("computed"))
