from detectron2.config import LazyCall as L

from mamba_vision.solver import WarmupMultiStep

# 3x: 36 epochs. Of COCO's 118,287 training images 117,266 hold objects; at 16 a step an epoch is
# ceil(117266 / 16) = 7330 steps, and 36 of them are 263,880 (common/train.py). The rate falls after
# epoch 27 (step 197,910) and epoch 33 (step 241,890).
lr_multiplier_3x = L(WarmupMultiStep)(
    max_iter="${train.max_iter}", epochs=36, drops=(27, 33), warmup_iters=1000
)
