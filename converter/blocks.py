"""A checkpoint's decoder blocks, one at a time, computed by transformers' own classes.

The model is built without its weights. Before a block runs, the model's own forward pass is run with recorders in the
blocks' places: what it hands to each block (masks, rotary embeddings, positions) is what the real block gets, so no
family's rules are repeated here.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

from ziggurat.converter import families, skeleton, weights
from ziggurat.converter.checkpoint import Checkpoint
from ziggurat.converter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from ziggurat.converter.repair import Fold

# Stored tensors that old checkpoints keep beside a block's weights, and transformers computes itself.
COMPUTED = (".inv_freq", ".attn.bias", ".attn.masked_bias")

# Bytes of the head's matrix that are turned into the computing type at a time.
HEAD_BYTES = 1 << 26


class Block:
    """One decoder block with its weights, callable on hidden states.

    Attributes:
        layer: transformers' module.
        index: which block.
        prefix: what the names of its tensors in the checkpoint begin with, such as `model.layers.3.`.
        family: how it is built.
    """

    def __init__(self, blocks: Blocks, index: int, layer: Any, prefix: str) -> None:
        self._blocks = blocks
        self.index, self.layer, self.prefix, self.family = index, layer, prefix, blocks.family

    @property
    def mlp(self) -> Any:
        """The module whose output is the feed-forward part's; some give a tuple that begins with it."""
        name = self.family.mlp
        if self.family.experts is not None and not hasattr(self.layer, name):
            name = self.family.experts.module
        return getattr(self.layer, name)

    def stored_name(self, path: str) -> str:
        """The name in the checkpoint of what is at `path` within transformers' module: `self_attn.q_proj`."""
        return self.prefix + weights.stored_path(path, self.family.experts)

    def fold_down(self, fold: Fold) -> None:
        """Fold a correction into what ends the feed-forward part: a linear layer with its bias, or fused experts."""
        import torch

        family, mlp = self.family, self.mlp
        layer = mlp.experts if family.down is None else getattr(mlp, family.down)
        weight = layer.down_proj if family.down is None else layer.weight
        with torch.no_grad():
            if type(layer).__name__ == "Conv1D":  # its matrix is [columns, rows]
                weight = weight.T
            weight.copy_(torch.from_numpy(fold.weight(weight.float().cpu().numpy())))
            bias = getattr(layer, "bias", None)
            if bias is not None:
                bias.copy_(torch.from_numpy(fold.bias(bias.float().cpu().numpy())))

    def __call__(self, hidden: torch.Tensor, *, differentiable: bool = False) -> torch.Tensor:
        """Hidden states behind the block: shape [sequences, positions, n_embd] like those before it."""
        import torch

        args, kwargs = self._blocks.call_arguments(*hidden.shape[:2])[self.index]
        with torch.set_grad_enabled(differentiable):
            out = self.layer(hidden, *args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result


class Blocks:
    """The decoder blocks of a checkpoint, of which none is in memory until it is asked for.

    Attributes:
        checkpoint: what they are read from.
        family: how its model is built.
        device: where they compute.
        dtype: torch's type they compute in.
        n_layer: how many there are.
        n_embd: width of the hidden states.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        """Build the model without weights.

        Raises:
            UnsupportedModelError: the family is not known, or the weights are quantized.
            CheckpointError: configuration and weights do not fit each other.
            LibraryError: torch or transformers is missing.
            ConvertError: there is no such device.
        """
        self.checkpoint, self.family = checkpoint, families.find(checkpoint)
        weights.refuse_quantized(checkpoint)
        self.device, self.dtype = skeleton.place(device, dtype)
        config, model = skeleton.build(checkpoint, self.family)
        self._config, self._model = config, model
        self._base = getattr(model, model.base_model_prefix)
        self._layers = list(getattr(self._base, self.family.layers))
        self._prefix = self._stored_prefix(model.base_model_prefix)
        self.n_layer, self.n_embd = len(self._layers), int(config.hidden_size)
        self.n_vocab = checkpoint.tensors[self._embedding_name].shape[0]
        self._recorders = skeleton.install_recorders(self._base, self.family.layers, self.n_layer)
        self._norm = getattr(self._base, self.family.norm)
        self._arguments: dict[tuple[int, int], list[Any]] = {}
        self._loaded_norm: Any = None
        self._head: torch.Tensor | None = None
        self._place_computed()

    def _stored_prefix(self, base: str) -> str:
        """What the names of the base model's tensors begin with: checkpoints of a base model alone have no prefix."""
        for prefix in (f"{base}.", ""):
            if f"{prefix}{self.family.embedding}.weight" in self.checkpoint.tensors:
                return prefix
        raise CheckpointError(
            f"{self.checkpoint.folder} has no tensor {base}.{self.family.embedding}.weight: these are not the weights "
            f"of a {self.checkpoint.architecture}, download it again"
        )

    @property
    def _embedding_name(self) -> str:
        return f"{self._prefix}{self.family.embedding}.weight"

    def _place_computed(self) -> None:
        """Bring what the model computes for itself (rotary frequencies) and small learned tables to the device."""
        for name, module in list(self._base.named_children()):
            if name not in (self.family.layers, self.family.embedding, self.family.norm):
                if next(module.parameters(), None) is not None:  # GPT-2's positions
                    self._load(module, f"{self._prefix}{name}.")
                module.to(self.device)

    def _load(self, module: Any, prefix: str) -> None:
        """Fill a module with the tensors whose names begin with `prefix`.

        Raises:
            CheckpointError: one is missing, has another shape, or has no place.
        """
        weights.fill(module, self.checkpoint, prefix, self.family.experts, self.device, self.dtype, COMPUTED)

    def block(self, index: int) -> Block:
        """Block `index` with its weights, read now.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or has no place in the block.
        """
        layer, prefix = copy.deepcopy(self._layers[index]), f"{self._prefix}{self.family.layers}.{index}."
        self._load(layer, prefix)
        return Block(self, index, layer.to(self.device), prefix)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first block.

        Args:
            tokens: ids, shape [sequences, positions]; only their rows of the embedding are read.

        Returns:
            Shape [sequences, positions, n_embd].
        """
        import torch

        ids, places = torch.unique(tokens.cpu(), return_inverse=True)
        rows = weights.rows(self.checkpoint, self._embedding_name, ids).to(self.device, self.dtype)
        embedding = getattr(self._base, self.family.embedding)
        embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None
        embedding.to(self.device)
        try:
            return self._prepare(input_ids=places.to(self.device))
        finally:
            embedding.weight = torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)

    def call_arguments(self, sequences: int, positions: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the model hands to each block beside hidden states of this shape: positional and named arguments."""
        import torch

        key = (sequences, positions)
        if key not in self._arguments:
            if len(self._arguments) > 1:  # at most those of the full batches and of a shorter last one
                self._arguments.clear()
            hidden = torch.zeros(sequences, positions, self.n_embd, device=self.device, dtype=self.dtype)
            self._prepare(inputs_embeds=hidden)
            self._arguments[key] = [recorder.seen for recorder in self._recorders]
        return self._arguments[key]

    def _prepare(self, **inputs: Any) -> torch.Tensor:
        """Run the model up to its blocks; the hidden states that the first would get."""
        import torch

        with torch.no_grad():
            try:
                self._base(use_cache=False, **inputs)
            except skeleton.Prepared:
                pass
        first: torch.Tensor = self._recorders[0].hidden
        self._recorders[0].hidden = None
        return first

    def final_norm(self, hidden: torch.Tensor, *, differentiable: bool = False) -> torch.Tensor:
        """What the head reads, of the hidden states behind the last block: of their shape."""
        import torch

        if self._loaded_norm is None:
            norm = copy.deepcopy(self._norm)
            self._load(norm, f"{self._prefix}{self.family.norm}.")
            self._loaded_norm = norm.to(self.device)
        with torch.set_grad_enabled(differentiable):
            normed: torch.Tensor = self._loaded_norm(hidden)
        return normed

    @property
    def head_matrix(self) -> torch.Tensor:
        """The matrix that makes logits of what the final norm gives: [n_vocab, n_embd], in its stored type.

        It stays in memory until `release_head`.
        """
        if self._head is None:
            tied = bool(getattr(self._config, "tie_word_embeddings", False))
            name = self._embedding_name if tied else "lm_head.weight"
            self._head = weights.read(self.checkpoint, name).to(self.device)
        return self._head

    @property
    def logit_cap(self) -> float | None:
        """Logits are kept below it by tanh; None: they are not."""
        cap: float | None = getattr(self._config, "final_logit_softcapping", None)
        return cap

    def embedding_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the token embedding as they are stored: float32 [len(ids), n_embd], on the CPU."""
        return weights.rows(self.checkpoint, self._embedding_name, ids).float()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the hidden states behind the last block, through the final norm.

        The head's matrix stays in memory in its stored type until `release_head`.

        Args:
            hidden: shape [..., n_embd].

        Returns:
            float32 of shape [..., n_vocab].
        """
        import torch

        matrix, normed = self.head_matrix, self.final_norm(hidden)
        with torch.no_grad():
            step = max(1, HEAD_BYTES // (4 * self.n_embd))
            logits = torch.cat(
                [(normed @ matrix[i : i + step].to(self.dtype).T).float() for i in range(0, len(matrix), step)], dim=-1
            )
            cap = self.logit_cap
            return logits if cap is None else torch.tanh(logits / cap) * cap

    def release_head(self) -> None:
        """Forget the head's matrix."""
        self._head = None
