from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train

train.max_iter = 263880  # 36 epochs of 7330 steps: see schedule.py
train.eval_period = 7330
train.checkpointer.update(period=7330, max_to_keep=3)
train.log_period = 50

train.amp.update(enabled=True, dtype="fp16")  # or bf16

train.seed = -1  # from 0 on the same numbers are drawn in every run

# Detectron2's own training tool does not read what is below; see docs/training_options.md.
train.accumulate = 1  # micro-batches that a step's images are taken in
train.auto_scale_lr = False  # scale optimizer.lr by dataloader.train.total_batch_size / 16
train.best_metric = "bbox/AP"  # what model_best.pth is best in
train.max_nonfinite = 5  # steps in a row without a finite loss that stop the run
train.max_bad_images = 10  # training images that cannot be used; more stop the run
train.compile = False  # compile the backbone
train.ema_decay = 0.0  # average the weights, and evaluate the average; for example 0.9998
train.eval_amp = ""  # evaluate in fp16 or bf16
train.fuse_eval = True  # evaluate a copy with batch norms folded into convolutions
train.cuda_graphs = True  # on a GPU, evaluate it with CUDA graphs
train.patience = 0  # evaluations in a row without a better best_metric that end the training
train.val_loss = False  # also compute the loss of the test set
train.draw_images = 0  # images of the test set drawn, with what is found, in TensorBoard
train.wandb_project = ""  # also log to Weights & Biases
