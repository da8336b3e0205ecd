"""`CovGRPOTrainer`: TRL's GRPOTrainer, its advantages weighted token by token, its log-probs without logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from .. import (
    CovarianceWeighting,
    CovGRPOConfig,
    HighEntropy,
    Steer,
    covariance_weights,
    entropy_weights,
    linear_logprob,
    weighting_metrics,
)
from .transformers import patch_model

# What TRL hands to its scoring function beside the tokens, as `_generate_and_score_completions` names it.
_MULTIMODAL = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


class CovGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` (TRL 1.14 to 1.16) whose advantages are multiplied by the covariance weights of their tokens
    (arXiv 2605.11538), and which never builds the logits of a training batch.

    A script that trains with GRPOTrainer changes the line that imports it::

        from covgrpo_kernels.integrations.trl import CovGRPOTrainer as GRPOTrainer

    TRL's own loss runs on the weighted advantages, so that all its loss types and options mean what they did. With
    ``weighting="none"`` the algorithm is TRL's own too, without the logits.

    A token is compared with all tokens of all completions of its prompt (tool output and padding left out), exactly,
    although TRL spreads these over ranks and shuffles them over micro-batches. Which log-probs the weights come from:

    - Where TRL keeps old log-probs (a generation serves more than one optimiser step, or vLLM samples): from these,
      once for each generation.
    - Where it keeps none, the policy is the same from the generation to the loss. With ``steps_per_generation=1`` a
      loss sees all completions of its prompts, over all ranks, and the weights come from its own log-probs. Else the
      generation is scored once by the policy without gradient, which costs one more forward pass a completion.

    The weights of STEER and of the 80/20 rule come from the log-probs and entropies of each loss, among its tokens on
    all ranks: those of a micro-batch, as their authors' codes have it. TRL's ``top_entropy_quantile`` keeps the tokens
    of the latter too, but divides by the number of all.

    What TRL's log gets is listed in docs/integrations.md: the metrics ``weight/*`` and ``covariance/*`` of
    `covgrpo_loss`, over the tokens of all ranks; ``rows/live_fraction``, the share of tokens whose log-prob or entropy
    has a gradient, the others costing no backward of the head; and ``ratio/non_finite``, how many tokens of a
    micro-batch, on all ranks, have an importance ratio that is inf or NaN (its sequence's ratio, where TRL's
    ``importance_sampling_level`` says so). It should be zero. As for all of TRL's metrics, the log has the mean over
    the micro-batches since the last one.

    Args:
        *args, **kwargs: as GRPOTrainer takes them.
        weighting: "covariance", "steer", "high_entropy", "none" (or None), a `CovarianceWeighting` whose weights are
            not differentiated, a `Steer` or a `HighEntropy`. Scope "batch" is the batch of a generation.
        fused_head: log-probs by `linear_logprob`, through `patch_model`; inputs with images, or with token type ids, go
            TRL's way. False leaves all to TRL. With TRL 1.14 it also takes the place of ``use_liger_kernel``'s path,
            whose kernels for layers stay.
        grad_tol: as `linear_logprob` takes it: "auto" or a number, 0 for exact gradients.

    Raises:
        TypeError, ValueError: a wrong argument, by name; with ``fused_head`` also a model that `patch_model` refuses.
    """

    args: Any
    model: Any
    num_generations: int
    num_generations_eval: int

    def __init__(
        self,
        *args: Any,
        weighting: str | CovarianceWeighting | Steer | HighEntropy | None = "covariance",
        fused_head: bool = True,
        grad_tol: float | str = "auto",
        **kwargs: Any,
    ) -> None:
        self._weighting = _checked_weighting(weighting)
        if not isinstance(fused_head, bool):
            raise TypeError(f"fused_head must be a bool, got {type(fused_head).__name__}")
        # Of no tokens: what checks grad_tol, before there is a model.
        nothing = torch.zeros(0, 1)
        linear_logprob(nothing, torch.zeros(1, 1), torch.zeros(0, dtype=torch.long), grad_tol=grad_tol)
        self._fused_head = fused_head
        # Inputs of the loss that is being computed, until it has its log-probs.
        self._loss_inputs: dict[str, Any] | None = None
        # Of the losses whose backward has run: tokens with a gradient, and tokens.
        self._live_rows: list[Tensor] = []
        super().__init__(*args, **kwargs)
        if isinstance(self._weighting, (Steer, HighEntropy)) and self.importance_sampling_level == "sequence":
            raise ValueError("importance_sampling_level must be 'token' with weights by entropy, got 'sequence'")
        if not fused_head:
            return
        if getattr(self, "use_liger_kernel", False):
            # Of TRL 1.14: its loss around the wrapped model, and a forward in place of ours when training starts.
            self.use_liger_kernel = False
            layers_only = {"fused_linear_cross_entropy": False}
            self.args.liger_kernel_config = (self.args.liger_kernel_config or {}) | layers_only
        for model in (self.model, self.ref_model):
            if model is not None:
                patch_model(
                    self.accelerator.unwrap_model(model),
                    temperature=self.temperature,
                    grad_tol=grad_tol,
                    autocast=not self.args.cast_lm_head_to_fp32,
                )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not isinstance(self._weighting, CovarianceWeighting):
            return output
        training = self.model.training
        # As for TRL's advantages: the ranks' rows follow each other, and so do a prompt's completions.
        completion_ids = output["completion_ids"]
        rows = torch.arange(len(completion_ids), device=completion_ids.device)
        rows += self.accelerator.process_index * len(rows)
        output["group_ids"] = rows // (self.num_generations if training else self.num_generations_eval)

        logprobs = output.get("old_per_token_logps")
        if logprobs is None and training and self.args.steps_per_generation > 1:
            images: dict[str, Any] = {name: output[name] for name in _MULTIMODAL if name in output}
            with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                logprobs, *_ = self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([output["prompt_ids"], completion_ids], dim=1),
                    torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                    completion_ids.size(1),
                    batch_size=self.args.per_device_train_batch_size,
                    **images,
                )
        if logprobs is not None:
            self._weight_advantages(output, logprobs)
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        counts = torch.stack([*self._live_rows, torch.zeros(2, dtype=torch.int64, device=loss.device)]).sum(0)
        self._live_rows.clear()
        live, total = self.accelerator.gather(counts).view(-1, 2).sum(0)
        self._add_metric("rows/live_fraction", live / total.clamp(min=1))
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._loss_inputs = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs = None

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,  # [B, P + T]
        attention_mask: Tensor,  # [B, P + T]
        logits_to_keep: int,  # T
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # [B, T], [B, T], []
        by_entropy = self._loss_inputs is not None and isinstance(self._weighting, (Steer, HighEntropy))
        compute_entropy = compute_entropy or by_entropy
        flags: dict[str, Any] = dict(
            batch_size=batch_size, compute_entropy=compute_entropy, compute_aux_loss=compute_aux_loss
        )
        if self._fused_head and all(value is None for value in multimodal.values()):
            result = self._score(model, input_ids, attention_mask, logits_to_keep, **flags)
        else:
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **flags, **multimodal
            )
        if self._loss_inputs is not None:
            inputs, self._loss_inputs = self._loss_inputs, None
            self._count_ratios(inputs, result[0].detach())
            self._count_live_rows(inputs, [x for x in result[:2] if x is not None and x.requires_grad])
            # The loss looks at its advantages after it has got its log-probs. TRL may use the weighted ones again,
            # before the next optimiser step.
            if "group_ids" in inputs:
                self._weight_advantages(inputs, result[0].detach())
            if by_entropy:
                assert result[1] is not None
                self._weight_advantages_by_entropy(inputs, result[0], result[1])
        return result

    def _score(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *,
        batch_size: int | None,
        compute_entropy: bool,
        compute_aux_loss: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What TRL's function returns, of tokens alone."""
        router = {"output_router_logits": True} if compute_aux_loss else {}
        size = batch_size or max(len(input_ids), 1)
        batches = []
        for ids, attention in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            labels = ids.masked_fill(attention == 0, -100)
            labels[:, :-logits_to_keep] = -100
            inputs = dict(input_ids=ids, attention_mask=attention, labels=labels, **router)
            with self.accelerator.autocast():
                batches.append(model(**inputs, return_logprobs=True, entropy=compute_entropy))
        return (
            torch.cat([batch.logprobs[:, -logits_to_keep:] for batch in batches]),
            torch.cat([batch.entropy[:, -logits_to_keep:] for batch in batches]) if compute_entropy else None,
            torch.stack([batch.aux_loss for batch in batches]).mean() if compute_aux_loss else None,
        )

    @torch.no_grad()
    def _weight_advantages(self, inputs: dict[str, Any], logprobs: Tensor) -> None:  # [B, T]
        """Replaces the advantages [B] by those of tokens [B, T], and the group ids by nothing."""
        assert isinstance(self._weighting, CovarianceWeighting)
        mask = _loss_mask(inputs)
        weights, covariance = covariance_weights(
            logprobs, inputs["advantages"], mask, group_ids=inputs.pop("group_ids"), weighting=self._weighting,
            process_group=self._all_ranks, return_covariance=True,
        )  # fmt: skip
        inputs["advantages"] = inputs["advantages"].unsqueeze(1) * weights
        self._log_weights(weights, covariance, mask)

    @torch.no_grad()
    def _weight_advantages_by_entropy(self, inputs: dict[str, Any], logprobs: Tensor, entropy: Tensor) -> None:
        """Replaces the advantages [B] by those of tokens [B, T]. TRL comes back to the same inputs after an optimiser
        step, with other log-probs: the advantages as they were are kept."""
        assert isinstance(self._weighting, (Steer, HighEntropy))
        advantages, mask = inputs.setdefault("unweighted_advantages", inputs["advantages"]), _loss_mask(inputs)
        weights = entropy_weights(
            logprobs, entropy, advantages, mask, weighting=self._weighting,
            old_logprobs=inputs.get("old_per_token_logps"), process_group=self._all_ranks,
        )  # fmt: skip
        inputs["advantages"] = advantages.unsqueeze(1) * weights
        self._log_weights(weights, None, mask)

    @property
    def _all_ranks(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.accelerator.num_processes > 1 else None

    def _log_weights(self, weights: Tensor, covariance: Tensor | None, mask: Tensor) -> None:  # [B, T]
        # Of all ranks' tokens: quantiles cannot be merged.
        named = (weights, weights if covariance is None else covariance, mask.to(weights.dtype))
        columns = torch.stack([values.flatten() for values in named], dim=1)
        columns = self.accelerator.gather(self.accelerator.pad_across_processes(columns, dim=0))
        of_all, covariance_of_all, valid = columns.unbind(1)
        for name, value in weighting_metrics(of_all, covariance_of_all, valid != 0).items():
            if covariance is not None or name.startswith("weight/"):
                self._add_metric(name, value)

    def _count_live_rows(self, inputs: dict[str, Any], outputs: list[Tensor]) -> None:  # [B, T] each
        """When the gradients of these log-probs and entropies are there."""
        mask = _loss_mask(inputs) != 0

        def count(grads: Sequence[Tensor | None]) -> None:
            live = torch.stack([grad != 0 for grad in grads if grad is not None]).any(0)
            self._live_rows.append(torch.stack([live & mask, mask]).sum((1, 2)))

        if outputs:
            torch.autograd.graph.register_multi_grad_hook(outputs, count)

    @torch.no_grad()
    def _count_ratios(self, inputs: dict[str, Any], logprobs: Tensor) -> None:  # [B, T]
        mask, old = _loss_mask(inputs), inputs.get("old_per_token_logps")
        log_ratio = logprobs - (logprobs if old is None else old)
        if self.importance_sampling_level == "sequence":
            log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(log_ratio)
        count = (~log_ratio.exp().isfinite() & (mask != 0)).sum()
        self._add_metric("ratio/non_finite", self.accelerator.gather(count).sum())

    def _add_metric(self, name: str, value: Tensor) -> None:  # []
        self._metrics["train" if self.model.training else "eval"][name].append(value.item())


def _loss_mask(inputs: dict[str, Any]) -> Tensor:  # [B, T], nonzero where TRL's loss counts a token
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs.get("tool_mask", 1)


def _checked_weighting(weighting: object) -> CovarianceWeighting | Steer | HighEntropy | None:
    kind = CovGRPOConfig(weighting="none" if weighting is None else weighting).token_weighting  # type: ignore[arg-type]
    if kind is None or isinstance(kind, (Steer, HighEntropy)):
        return kind
    if not isinstance(kind, CovarianceWeighting) or kind.differentiate_weights:
        raise ValueError(
            "weighting must be 'covariance', 'steer', 'high_entropy', 'none', a CovarianceWeighting without "
            "differentiate_weights, a Steer or a HighEntropy: TRL's loss takes what can be multiplied to an advantage, "
            f"got {weighting!r}"
        )
    return kind
