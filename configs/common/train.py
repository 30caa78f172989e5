from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train

train.amp.enabled = True
train.max_iter = 263880  # 36 epochs of 7330 steps: see schedule.py
train.eval_period = 7330
train.checkpointer.update(period=7330, max_to_keep=3)
train.log_period = 50
