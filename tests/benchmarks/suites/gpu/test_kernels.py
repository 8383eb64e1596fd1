"""The profiler's kernels of one call, sorted into the budget's lines."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.suites.gpu import kernels


def event(name, start, length, device="CUDA", annotation=False):
    """As `torch._C._autograd._KinetoEvent` answers."""
    return SimpleNamespace(
        name=lambda: name, start_ns=lambda: start, duration_ns=lambda: length,
        device_type=lambda: getattr(torch.autograd.DeviceType, device), is_user_annotation=lambda: annotation,
    )  # fmt: skip


class TestKernels:
    def test_annotations_waits_and_host_calls_are_no_kernels(self):
        trace = kernels.trace_of(
            [
                event("cudaLaunchKernel", 0, 5_000, "CPU"),
                event("cuLaunchKernelEx", 0, 5_000, "CPU"),
                event("cudaLaunchKernel", 0, 5_000, "CPU"),
                event("FSDP::pre_forward", 0, 9_000_000, annotation=True),
                event("Stream Wait Event", 0, 8_000_000),
                event("Context Sync", 0, 8_000_000),
                event("nvjet_tst_128x256", 1_000_000, 2_000_000),
                event(
                    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
                    2_000_000,
                    2_000_000,
                ),
            ],
            "CUDA",
        )
        assert (trace.calls, trace.launches, trace.ms, trace.busy_ms, trace.span_ms) == (2, 3, 4.0, 3.0, 3.0)
        assert trace.by_class()["products"] == trace.by_class()["elementwise"] == 2.0

    def test_long_products_are_the_heads_and_one_name_may_be_both(self):
        rows = "cross_entropy_rows_kernel"
        events = [
            event("nvjet_x", 0, 1_000_000),
            event("nvjet_x", 2_000_000, 100_000),
            event(rows, 3_000_000, 50),
        ]
        events += [event("flash_bwd", 4_000_000, 2_000_000)]  # long too, and no product
        trace = kernels.trace_of(events, "CUDA", long_product_ms=0.5)
        assert {(k.name, k.kind, k.calls) for k in trace.kernels} == {
            ("nvjet_x", "head", 1), ("nvjet_x", "products", 1), (rows, "head", 1), ("flash_bwd", "attention", 1),
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            (
                "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>",
                "attention",
            ),
            ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
            (
                "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_tn_align8>",
                "products",
            ),
            ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products"),
            (
                (
                    "multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>,"
                    " FusedAdamMathFunctor<float, 4>>"
                ),
                "optimizer",
            ),
            (
                "multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float, (NormType)1, float>>",
                "optimizer",
            ),
            ("adamw_8bit_kernel", "optimizer"),
            (
                "multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float, float, 2, 1, 1>>",
                "sharding",
            ),
            (
                "void at::native::(anonymous namespace)::chunk_cat_cuda_kernel<float, c10::BFloat16>",
                "sharding",
            ),
            ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "sharding"),
            ("Memcpy DtoD (Device -> Device)", "sharding"),
            ("Memcpy HtoD (Pinned -> Device)", "transfers"),
            ("Memset (Device)", "transfers"),
            (
                (
                    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(TensorIterator&)>"
                ),
                "copies",
            ),
            ("void at::native::elementwise_kernel<128, 4, MulFunctor<float>>", "elementwise"),
            ("void at::native::reduce_kernel<512, 1, ReduceOp<float, MeanOps<float>>>", "elementwise"),
            ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "elementwise"),
            ("triton_poi_fused_split_with_sizes_view_1", "elementwise"),
            ("triton_tem_fused_mm_2", "products"),
            ("_rms_norm_backward_kernel", "elementwise"),
            ("_triton_rope", "elementwise"),
            ("kept_hidden_kernel", "head"),
            ("some_new_thing", "other"),
        ],
    )
    def test_a_name_is_of_one_class(self, name, kind):
        assert kernels.class_of(name) == kind

    def test_a_profiler_that_sees_nothing_says_so(self):
        with pytest.raises(kernels.NoKernels, match="CUDA"):
            kernels.trace_of([event("cudaLaunchKernel", 0, 5, "CPU")], "CUDA")

    def test_a_real_profile_is_read(self):
        a = torch.randn(64, 64)
        trace = kernels.traced(lambda: a @ a, "cpu", long_product_ms=1e9)
        assert [k.calls for k in trace.kernels if k.name == "aten::mm"] == [1]
        assert trace.by_class()["products"] > 0
        assert "aten::mm" in trace.table("title", rows=3)
        assert trace.table("title", rows=3).startswith("title\n")
