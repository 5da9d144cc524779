from flow_factory.models.stable_diffusion.sd3_5 import SD3_5Adapter
from flow_factory.utils.base import filter_kwargs

from star.capture import allocated
from star.concepts import locate, parse


class StarAdapter(SD3_5Adapter):
    def forward(self, prompt=None, **kwargs):
        kwargs = filter_kwargs(super().forward, **kwargs)
        if prompt is None:  # the sampler; the update passes the whole batch
            return super().forward(**kwargs)
        (batch, text, _), (rows, columns) = kwargs["prompt_embeds"].shape, kwargs["latents"].shape[-2:]
        clip, t5 = self.pipeline.tokenizer, self.pipeline.tokenizer_3
        tokens = locate(prompt, [parse(p) for p in prompt], clip, t5, max_sequence_length=text - clip.model_max_length)
        with allocated(self.transformer, tokens, grid=(rows // 2, columns // 2), rows=slice(-batch, None)):
            return super().forward(**kwargs)
