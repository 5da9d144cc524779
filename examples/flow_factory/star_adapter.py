from flow_factory.models.stable_diffusion.sd3_5 import SD3_5Adapter
from flow_factory.utils.base import filter_kwargs

from star import allocated, concept_tokens


class StarAdapter(SD3_5Adapter):
    def forward(self, prompt=None, **kwargs):
        kwargs = filter_kwargs(super().forward, **kwargs)
        if prompt is None:  # the sampler; the update passes the whole batch
            return super().forward(**kwargs)
        length = kwargs["prompt_embeds"].shape[1] - self.pipeline.tokenizer.model_max_length  # of T5's part
        with allocated(self.transformer, concept_tokens(self.pipeline, prompt, max_sequence_length=length)):
            return super().forward(**kwargs)
