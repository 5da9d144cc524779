from diffusers import QwenImagePipeline
from verl_omni.pipelines.model_base import DiffusionModelBase
from verl_omni.pipelines.qwen_image_flow_grpo.diffusers_training_adapter import QwenImage

from star import allocated, concept_tokens


@DiffusionModelBase.register("QwenImagePipeline", algorithm="flow_grpo")
class StarQwenImage(QwenImage):
    @classmethod
    def forward_and_sample_previous_step(cls, module, scheduler, config, inputs, negative, data, step):
        texts = config.tokenizer.batch_decode(data["prompts"], skip_special_tokens=True)
        prompts = [text.split("user\n", 1)[1].removesuffix("\nassistant\n") for text in texts]
        tokens = concept_tokens(QwenImagePipeline(None, None, None, config.tokenizer, None), prompts)
        with allocated(module, tokens, first_pass=True):
            return super().forward_and_sample_previous_step(module, scheduler, config, inputs, negative, data, step)
