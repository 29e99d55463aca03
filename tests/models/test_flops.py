"""Operations per token equal torch's own count of the matrix products."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain_lib.models.flops import count_parameters, device_peak, known_peak, model_flops
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig

SMALL = {"vocabulary_size": 97, "context_length": 32, "num_layers": 3, "num_heads": 4, "width": 32}
BUILDERS = {
    "gpt2": lambda multiple: GPT2(GPT2Config(**SMALL, vocabulary_multiple=multiple)),
    "llama": lambda multiple: Llama(
        LlamaConfig(**SMALL, num_key_value_heads=2, mlp_width=80, vocabulary_multiple=multiple)
    ),
    "tied llama": lambda multiple: Llama(
        LlamaConfig(
            **SMALL,
            num_key_value_heads=4,
            mlp_width=80,
            tied_head=True,
            vocabulary_multiple=multiple,
        )
    ),
    "qwen3": lambda multiple: Llama(
        LlamaConfig(
            **SMALL,
            num_key_value_heads=2,
            mlp_width=80,
            head_width=12,
            qk_norm=True,
            vocabulary_multiple=multiple,
        )
    ),
}


@pytest.mark.parametrize("multiple", [1, 128])
def test_gpt2_124m_has_the_operations_of_both_conventions(multiple):
    with torch.device("meta"):
        model = GPT2(GPT2Config(vocabulary_multiple=multiple))
    flops = model_flops(model, sequence_length=1024)
    assert flops.parameters == 6 * (124_439_808 - 1024 * 768)
    assert flops.attention == 12 * 12 * 768 * 1024
    assert flops.total == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("multiple", [1, 4096 * 3])
def test_llama_1_3b_has_the_operations_of_both_conventions(multiple):
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocabulary_multiple=multiple))
    flops = model_flops(model, sequence_length=2048)
    # The untied input embedding is looked up, not multiplied with.
    assert flops.total == 6 * (1_266_780_160 - 8192 * 2048) + 12 * 24 * 2048 * 2048


@pytest.mark.parametrize("length", [8, 32])
@pytest.mark.parametrize("name", BUILDERS)
def test_operations_are_three_times_the_matrix_products_of_a_forward(name, length):
    model = BUILDERS[name](1).initialize(0)
    ids = torch.zeros(2, length, dtype=torch.int64)
    # The plain kernel shows attention as the two full products that the convention counts.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    # Biases and norms are in N by convention, though they are no matrix products.
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    expected = 3 * counter.get_total_flops() / ids.numel() + 6 * vectors
    assert model_flops(model, sequence_length=length).total == expected
    assert 6 * vectors < 0.04 * expected  # so the two counts differ by less than 4 per cent


@pytest.mark.parametrize("name", BUILDERS)
def test_padding_rows_are_neither_parameters_nor_operations(name):
    plain, padded = BUILDERS[name](1), BUILDERS[name](128)
    assert plain.head_weight.shape[0] == 97 and padded.head_weight.shape[0] == 128
    assert count_parameters(plain) == sum(p.numel() for p in plain.parameters())
    assert count_parameters(padded) == count_parameters(plain)
    assert model_flops(padded, sequence_length=32) == model_flops(plain, sequence_length=32)


def test_a_cpu_has_a_positive_peak():
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert 0 < peak < float("inf")


def test_a_device_without_a_data_sheet_has_no_peak():
    assert device_peak(torch.device("mps"), torch.float32) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 4090 D", 147),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some other GPU", None),
    ],
)
def test_a_gpu_is_known_by_the_name_of_its_driver(name, tflops):
    assert known_peak(name) == (tflops and tflops * 1e12)
