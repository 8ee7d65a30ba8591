"""
When to stop and how wide to run: the exit gates and the width router.

Both read hidden states that carry no gradient: they observe the model and never bend it.
"""

import torch
from torch import nn

from .configuration_adamba import AdambaConfig
from .layers_adamba import ElasticRMSNorm


class Verdict(nn.Linear):
    """The last layer of a gate or router. New, it is zero and says 1/2 of everything; training moves it."""

    @property
    def is_trained(self) -> bool:
        hook = getattr(self, "_hf_hook", None)  # accelerate's, where the weight is offloaded between calls
        if hook is not None:
            hook.pre_forward(self)
        trained = bool(self.weight.any())
        if hook is not None:
            hook.post_forward(self, ())
        return trained


class ExitGate(nn.Module):
    """P(stopping after this layer gives the same token as the full depth), as a logit, for each position."""

    def __init__(self, config: AdambaConfig):
        super().__init__()
        self.norm = ElasticRMSNorm(config.hidden_size, config.norm_base_width, config.rms_norm_eps, gain=False)
        self.up_proj = nn.Linear(config.hidden_size, config.exit_gate_size)
        self.down_proj = Verdict(config.exit_gate_size, 1)
        # Calibration (`run_eval.py --calibrate`): logit / temperature; 1 leaves the gate as trained.
        self.temperature = nn.Buffer(torch.ones(()))

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        features = nn.functional.silu(self.up_proj(self.norm(hidden_BLD.detach())))
        return self.down_proj(features).squeeze(-1) / self.temperature


class WidthRouter(nn.Module):
    """
    From the prompt's embeddings alone: for each attention layer and each width level but the widest, the logit of
    P(this level is wide enough), that is, its loss stays within the trained tolerance of the full width's.
    """

    def __init__(self, config: AdambaConfig):
        super().__init__()
        self.num_layers = config.num_attention_layers
        self.num_levels = len(config.width_levels)
        self.norm = ElasticRMSNorm(config.hidden_size, config.norm_base_width, config.rms_norm_eps, gain=False)
        self.up_proj = nn.Linear(config.hidden_size, config.router_size)
        self.down_proj = Verdict(config.router_size, self.num_layers * max(1, self.num_levels - 1))

    def forward(self, embeddings_BLD: torch.Tensor, prompt_mask_BL: torch.Tensor) -> torch.Tensor:
        """Returns (B, attention layers, levels - 1). Each token is judged, then the prompt's tokens are averaged."""
        features = nn.functional.silu(self.up_proj(self.norm(embeddings_BLD.detach())))
        weights = prompt_mask_BL.to(features.dtype)
        pooled = (features * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        return self.down_proj(pooled).view(-1, self.num_layers, max(1, self.num_levels - 1))

    @torch.no_grad()
    def choose(
        self, embeddings_BLD: torch.Tensor, prompt_mask_BL: torch.Tensor, confidence: float = 0.5
    ) -> torch.Tensor:
        """(B, attention layers): the index of the cheapest level that is wide enough with this confidence."""
        if self.num_levels == 1:
            return torch.zeros(embeddings_BLD.shape[0], self.num_layers, dtype=torch.long)
        enough = self(embeddings_BLD, prompt_mask_BL).sigmoid() >= confidence
        widest = torch.ones_like(enough[..., :1])
        return torch.cat((enough, widest), dim=-1).int().argmax(-1)
