"""What a failed check's number means, and what to look at first."""

SHARE = "the number is the largest change of an output, as a share of the largest output"

ADVICE = {
    "repeat":
        f"{SHARE}, between two equal calls. Look at: what a call writes to the module (caches, "
        "statistics, counters), and random numbers that torch's seed does not govern.",
    "before":
        f"{SHARE}, between a call of a fresh model and the same one behind another. Look at: what "
        "the first call sets, results and tables that are kept in the module, their keys and "
        "their dtype.",
    "rows":
        f"{SHARE}, when only other sequences change. Look at: means, norms and maxima without "
        "dim=, reshapes that mix batch and time, buffers written in the forward pass.",
    "suffix":
        f"{SHARE}, when only later tokens change. Look at: the mask's diagonal, statistics "
        "over the whole time axis, padding on the wrong side, the end of a chunk.",
    "gradient":
        "the number is the gradient that reaches a later token, over the largest. If suffix "
        "passes, look at: detach() beside what is not detached, custom backward passes.",
    "length":
        f"{SHARE}, when a sequence ends earlier. Look at: divisions by T, positions counted "
        "from the end, other code for other lengths.",
    "huge":
        f"{SHARE}, when later tokens are very large. Look at: a maximum over all tokens, or "
        "over a chunk, that is subtracted before exp.",
    "split":
        f"{SHARE}, between a sequence in pieces and at once. Look at: what the state lacks, "
        "positions that start at 0 in each piece, a chunk that begins anew. Of gradients alone: "
        "detach(), a state of integers; training at once and decoding are not touched by it.",
    "branch":
        "a state was changed by what came after it. Look at: in-place operations on what the "
        "state holds; cat or clone instead.",
    "bytes":
        "counted are all tensors in the state. Look at: state_bytes(T, dtype) at those T.",
    "declared":
        "counted are all tensors in the state. Look at: state_bytes(T, dtype) at that T.",
    "storage":
        "the state is a view of a tensor of all tokens. Look at: clone() of the last ones.",
    "bfloat16":
        "the error is the root mean square over that of the output, 1 eps being 0.008. Look "
        "at: sums, exponentials and differences of near numbers in bfloat16; take float32.",
    "finite":
        "outputs or gradients are infinite or no number. Look at: exp without its maximum "
        "subtracted, divisions without a floor.",
    "depth":
        "gradients grow or vanish from layer to layer. Look at: scales of the outputs, custom "
        "backward passes.",
    "learns":
        "these parameters stay as they are. Look at: whether they are used; a buffer, or "
        "requires_grad=False, says that they are not to learn.",
    "bits":
        "two runs from one seed differ. Look at: random numbers outside torch, in-place sums "
        "from several threads.",
    "lengths":
        f"{SHARE}, between a beginning of two lengths. Look at: conditions on T, chunks, "
        "positions that are scaled by T.",
    "onward":
        f"{SHARE}, between what follows one call and the whole. Look at: the rest of the last "
        "chunk, and what the state keeps of it.",
    "inputs":
        "Look at: divisions by a norm or a deviation that is zero, thresholds, what compares "
        "tokens for equality.",
    "batches":
        f"{SHARE}, between a row in a batch and the same row elsewhere, or of a gradient. Look at: "
        "conditions on the number of rows, rows that are shifted or shared, sums over rows.",
    "sizes":
        f"{SHARE}, as with the questions of the small model. Look at: conditions on the layer, "
        "the head size, the width and the kind of positions.",
    "modes":
        f"{SHARE}, between the modes. Look at: is_grad_enabled, requires_grad, and a fast path "
        "for one of the two; get_num_threads; in-place operations on the input.",
    "compiled":
        f"{SHARE}, between compiled and plain code. Look at: is_compiling, custom operators.",
    "decode":
        f"{SHARE}, or the error, between single tokens and the whole. Look at: code for T = 1, "
        "its dtype, how old entries are dropped.",
    "ready":
        f"{SHARE}, between before and after. Look at: a bias, a scale or a dtype that "
        "ready_to_decode() leaves out.",
    "carried":
        f"{SHARE}, where only the state should matter. Look at: caches kept in self, in a "
        "global, or by an object's id; all of them belong into the state.",
    "backward":
        "Look at: a backward pass that changes what it saved, and what is kept in self "
        "between forward and backward; ctx.save_for_backward keeps it.",
    "derivative":
        "the number is the relative error of the gradient along random directions. Look at: "
        "custom backward passes, detach().",
    "slopes":
        "the number is the error of the gradient over its size. Look at: custom backward passes "
        "for one precision, sums in bfloat16.",
    "used":
        f"{SHARE}, of a mixer after training and many calls. Look at: counters, statistics, "
        "gates that open late; lists that are appended to in forward.",
    "saved":
        "a resumed or sampled model would be another one. Look at: tensors that are plain "
        "attributes; register_buffer keeps them in the checkpoint; what is made from weights once "
        "and kept; extra state, which no checkpoint holds; buffers that are views of weights.",
    "process":
        "the same command would train another model. Look at: hash(), sets of strings, id(), "
        "the time.",
    "chance":
        f"{SHARE}, when only later tokens or other rows change. Look at: what is done at random.",
    "seeds":
        "seeds would be no repetitions. Look at: manual_seed in the builder; a torch.Generator of "
        "its own seeds nothing else.",
    "flops":
        "the count takes products with weights whole and others at 0.4. Look at: "
        "flops_per_token(T) at that T.",
    "aside":
        "a call changes what is outside of it. Look at: manual_seed, set_default_dtype, and "
        "statistics that are collected without `if self.training`.",
}
