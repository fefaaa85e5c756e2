"""Step time, peak memory and kernels of variants of the fast linear (an exploration, kept for its numbers; bench.py is the tool).

    python results/throughput_first_look/profile.py 250m:mora:top=30 1.3b:mora:rec=1 ...

SHAPE:METHOD[:cudnn=0][:bits=32][:chunk=N][:al=N][:rec=1][:top=N]: attention without cuDNN, int32 orders, loss chunk, alignment, merged weight
recomputed in backward, print so many kernels. profile_3.txt was made with permutations of runs of 8 (run=32: of 32), since given up.
"""
import sys, time, gc, torch; sys.path.insert(0, '.')
import mora, loss
from bench import *
def block(n):
    for _ in range(n):
        next_step(model, ids, 1, device); torch.nn.utils.clip_grad_norm_(tr,1.0); optimizer.step(); optimizer.zero_grad()
class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, update, *parameters):
        merged = (weight + update.delta()).to(x.dtype)
        ctx.update = update
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, merged)
    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        merged = (weight + ctx.update.delta()).to(x.dtype)
        return dy @ merged, None, None, *ctx.update.gradients(ctx.update.compress(x), dy)
plain=mora.MergedLinear
for a in sys.argv[1:]:
    shape,name,*opts=a.split(":"); opts=dict(o.split("=") for o in opts)
    bits=opts.get("bits","64"); top=int(opts.get("top",0)); mora.ALIGNED=int(opts.get("al",8))
    torch.backends.cuda.enable_cudnn_sdp(opts.get("cudnn","1")=="1"); loss.CHUNK=int(opts.get("chunk",4096))
    mora.MergedLinear = Recompute if opts.get("rec") else plain
    cfg = settings(shape, name, 0, 512, 0); device=torch.device("cuda",0)
    with device: model = Llama(LlamaConfig(vocab_size=SHAPES[shape][4], **cfg.model()))
    optimizer = prepare_model(cfg, model, device, cycle=1)
    if bits=="32":
        for _,l in mora.adapted_layers(model):
            for f in (l.update.fold_in,l.update.fold_out): f.order=f.order.int(); f.inverse=f.inverse.int()
    tr=[p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(SHAPES[shape][4], (2,1,cfg.batch_size,512), device=device)
    block(3); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); ts=[]
    for _ in range(5):
        t=time.time(); block(4); torch.cuda.synchronize(); ts.append((time.time()-t)/4)
    t=sorted(ts)[2]
    print(f"{a:50} {t*1e3:8.2f} ms  {cfg.batch_size*512/t:9.0f} tok/s  {torch.cuda.max_memory_allocated()/2**30:6.2f} GiB", flush=True)
    if top:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as p:
            block(2); torch.cuda.synchronize()
        ev=[e for e in p.key_averages() if e.device_type==torch.autograd.DeviceType.CUDA]
        ev.sort(key=lambda e:-e.self_device_time_total)
        print(f"kernel time {sum(e.self_device_time_total for e in ev)/2e3:.1f} ms a step")
        for e in ev[:top]: print(f"{e.self_device_time_total/2e3:8.2f} ms {e.count/2:6.0f} x {e.self_device_time_total/e.count:8.1f} us  {e.key[:100]}")
    del model, optimizer, tr, ids; torch._dynamo.reset(); gc.collect(); torch.cuda.empty_cache()
