"""GPUs as data: what is known, and what a user's file may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1.plan.hardware import load_hardware, own_hardware, peak_bf16_flops


def test_every_gpu_of_a_plan_has_its_source() -> None:
    hardware = own_hardware()
    for name in ("h800", "H100", "H200", "A100", "B200"):
        gpu = hardware.find(name)
        assert gpu.name == name.upper() and "http" in gpu.source
    assert hardware.find("h800").nvlink_gb_s == 400 and hardware.find("h100").nvlink_gb_s == 900


def test_every_assumption_is_a_range_with_its_reason() -> None:
    for name, assumed in own_hardware().assumptions.items():
        assert 0 <= assumed.low <= assumed.high <= 1 and len(assumed.why) > 20, name


def test_a_users_file_adds_and_changes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "gpus:\n  H100: {network_gb_s: 25}\n  X1: {memory_gib: 96, bf16_tflops: 148, fp32_tflops: 40, "
        "nvlink_gb_s: 900, network_gb_s: 50, node: 8, source: mine}\nassumptions:\n  matrices: {low: 0.5}\n"
    )
    hardware = load_hardware(file)
    h100, matrices = hardware.find("h100"), hardware.assumptions["matrices"]
    assert (h100.network_gb_s, h100.nvlink_gb_s, hardware.find("x1").memory_gib) == (25, 900, 96)
    assert (matrices.low, matrices.high) == (0.5, own_hardware().assumptions["matrices"].high)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus: 3", "gpus is 3: give fields"),
        ("gpus: {X: {bf16_tflops: 1}}", r"gpus\.X has no source"),
        ("gpus: {X: {bf16_tflops: -1, source: s}}", r"bf16_tflops is -1: give a number above 0"),
        ("gpus: {X: {bf16_tflops: 1, source: s, node: 1.5}}", r"node is 1\.5"),
        ("gpus: {X: {peak: 1}}", "has 'peak': choose from bf16_tflops"),
        ("gpus: {X: {bf16_tflops: 1, source: 4}}", "source is 4: give a text"),
        ("assumptions: {luck: {low: 1, high: 1, why: w}}", "has 'luck': choose from matrices"),
        ("assumptions: {matrices: {low: 0.9}}", r"matrices is 0\.9 to 0\.7: give low and high, rising"),
        ("gpus: [", "mine.yaml"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_hardware(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be read: No such file"):
        load_hardware(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="nothing is known of a GPU 'h9000'"):
        own_hardware().find("h9000")
    with pytest.raises(
        ValueError, match="nothing says memory_gib, fp32_tflops, nvlink_gb_s, network_gb_s, node of GPU A800"
    ):
        own_hardware().find("a800")


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H1000", None),
        ("cpu", None),
    ],
)
def test_peak(name: str, flops: float | None) -> None:
    assert peak_bf16_flops(name) == flops
