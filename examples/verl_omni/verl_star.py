from verl_omni.pipelines.model_base import DiffusionModelBase
from verl_omni.pipelines.sd3_flow_grpo.diffusers_training_adapter import StableDiffusion3FlowGRPO

from star import allocated
from star.concepts import locate


@DiffusionModelBase.register("StableDiffusion3Pipeline", algorithm="flow_grpo")
class StarStableDiffusion3(StableDiffusion3FlowGRPO):
    @classmethod
    def forward_and_sample_previous_step(cls, module, scheduler, config, inputs, negative, data, step):
        prompts = config.tokenizer.batch_decode(data["prompts"], skip_special_tokens=True)
        with allocated(module, locate(prompts, config.tokenizer), first_pass=True):
            return super().forward_and_sample_previous_step(module, scheduler, config, inputs, negative, data, step)
