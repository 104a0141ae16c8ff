"""The columns of a run file: their names, units and meaning. A method may record more: these are the engine's own, and some of methods."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """What a column holds: its unit ("1" for a share or a count) and one line of description."""

    units: str = "1"
    about: str = ""


COLUMNS: dict[str, Column] = {
    "rounds/accuracy": Column("1", "share of the global test set that the server model classifies rightly"),
    "rounds/loss": Column("nat", "mean cross-entropy on the global test set"),
    "rounds/train_loss": Column("nat", "mean loss over the local steps of the cohort"),
    "rounds/density": Column("1", "kept conv and linear weights over those of the original network"),
    "rounds/nonzero_share": Column(
        "1", "conv and linear weights of the server's model that are not 0, behind closed gates too, over those of the original network"
    ),
    "rounds/density_maskable": Column("1", "kept weights over those that a mask may remove"),
    "rounds/train_flops": Column("FLOP", "training of the whole cohort, by the ledger"),
    "rounds/extra_flops": Column("FLOP", "of train_flops: what clients spend beside the passes of the model, such as on a hypernetwork"),
    "rounds/max_client_flops": Column("FLOP", "training of the busiest client, by the ledger"),
    "rounds/max_client_flops_at_mean": Column("FLOP", "the same if every client had the mean number of images, rounded"),
    "rounds/max_client_flops_share": Column("1", "the most, over clients, of its FLOPs over those of dense local training: 3 f_D n_k E"),
    "rounds/server_flops": Column("FLOP", "what the server itself computes with networks: pretraining, hypernetworks; in no other column"),
    "rounds/bytes_up": Column("B", "sent by all clients of the cohort"),
    "rounds/bytes_down": Column("B", "sent to all clients of the cohort"),
    "rounds/max_client_memory": Column("B", "training memory of the client that needs most, by the ledger"),
    "rounds/max_client_model_memory": Column("B", "the same without the activations of a batch"),
    "rounds/memory_weights": Column("B", "of max_client_memory: kept weights, other parameters and running statistics"),
    "rounds/memory_positions": Column("B", "of max_client_memory: where the kept weights stand"),
    "rounds/memory_gradients": Column("B", "of max_client_memory: gradients of kept weights and other parameters"),
    "rounds/memory_dense_gradient": Column("B", "of max_client_memory: the largest gradient that is formed at all positions of a layer"),
    "rounds/memory_optimiser": Column("B", "of max_client_memory: the optimiser's values"),
    "rounds/memory_top": Column("B", "of max_client_memory: buffers of the largest gradients, value and index"),
    "rounds/memory_personal": Column("B", "of max_client_memory: what stays with the client, and what the aggregation adds"),
    "rounds/memory_beside": Column("B", "of max_client_memory: what a work holds beside the model, such as other candidates"),
    "rounds/memory_activations": Column("B", "of max_client_memory: saved for the backward pass of a batch"),
    "rounds/memory_signs": Column("B", "of max_client_memory: a bit for each entry of a ReLU whose result is not saved"),
    "rounds/executed_memory": Column("B", "what this program holds for the clients that a rank trains at once, in one step, by the ledger"),
    "rounds/client_accuracy": Column("1", "right over all images of the clients' test shards"),
    "rounds/client_accuracy_macro": Column("1", "unweighted mean over clients of the accuracy on their test shards"),
    "rounds/client_accuracy_std": Column("1", "standard deviation over clients of the accuracy on their test shards"),
    "rounds/client_accuracy_min": Column("1", "lowest accuracy of a client on its test shard"),
    "rounds/client_accuracy_p10": Column("1", "10th percentile over clients of the accuracy on their test shards"),
    "rounds/clients_tested": Column("1", "clients with test images that were evaluated"),
    "rounds/inference_flops": Column("FLOP", "one forward pass of the server's model for one image"),
    "rounds/rank_bytes": Column("B", "exchanged between ranks: traffic of the simulator, not of the federation"),
    "rounds/rank0_bytes": Column("B", "the part of it that rank 0 sent and received"),
    "rounds/rank0_messages": Column("1", "messages that rank 0 sent to and received from other ranks"),
    "rounds/lr": Column("1", "learning rate of the local steps"),
    "rounds/seconds": Column("s", "wall time of the round"),
    "clients/in_cohort": Column("1", "1 where the client was in the cohort"),
    "clients/samples": Column("1", "training images seen in the round, repetitions and growth batches counted"),
    "clients/accuracy": Column("1", "accuracy of the client's model on its own test shard"),
    "clients/loss": Column("nat", "mean cross-entropy on its own test shard"),
    "clients/train_loss": Column("nat", "mean loss over its local steps"),
    "clients/density": Column("1", "kept conv and linear weights of the client's model over those of the original network"),
    "clients/train_flops": Column("FLOP", "its training, by the ledger"),
    "clients/bytes_up": Column("B", "sent by the client"),
    "clients/bytes_down": Column("B", "sent to the client"),
    "clients/memory": Column("B", "its training memory, by the ledger"),
    "layers/density": Column("1", "kept share of the layer's weights"),
    "layers/grown": Column("1", "weights grown in the round"),
    "layers/pruned": Column("1", "weights pruned in the round"),
    "timing/broadcast": Column("s", "sending the order and the shared tree"),
    "timing/compute": Column("s", "clients at work, the slowest rank"),
    "timing/reduce": Column("s", "collecting the sums"),
    "timing/server": Column("s", "the method's own work on the server"),
    "timing/evaluate": Column("s", "evaluation"),
    "timing/record": Column("s", "writing the previous round's row and checkpoint"),
    "speed/compute_flops": Column("FLOP/s", "useful FLOPs, by the ledger, over the seconds of compute, all ranks together"),
    "speed/compute_dense_flops": Column("FLOP/s", "the same if local training were dense, which a masked dense step really computes"),
    "speed/compute_bytes": Column("B/s", "at least: twice a client's training memory at every step, over the seconds of compute"),
    "speed/broadcast_bytes": Column("B/s", "between ranks, over the seconds of broadcast"),
    "speed/reduce_bytes": Column("B/s", "between ranks, over the seconds of reduce"),
    "speed/record_bytes": Column("B/s", "written, over the seconds of record"),
}

FORMS = {"gated": "with dynamic gates", "personal": "with dynamic gates, in the model that each client has trained further for itself"}
FORM = {
    "accuracy": ("1", "share of the global test set classified rightly"),
    "loss": ("nat", "mean cross-entropy on the global test set"),
    "client_accuracy": ("1", "right over all images of the clients' test shards"),
    "client_accuracy_macro": ("1", "unweighted mean over clients of the accuracy on their test shards"),
    "client_accuracy_min": ("1", "lowest accuracy of a client on its test shard"),
}

STATUS = "0 answered, 1 late, 2 failed, 3 unfit, 4 unavailable"
OF_DEVICES: dict[str, Column] = {
    "rounds/clock": Column("s", "virtual time since the start, at the end of the round"),
    "rounds/round_time": Column("s", "virtual time that the round took"),
    "rounds/energy": Column("J", "used by the devices of all clients that were asked"),
    "rounds/late": Column("1", "clients that were asked and whose answer came too late, or after enough others"),
    "rounds/failed": Column("1", "clients that left in the middle of the round"),
    "rounds/unfit": Column("1", "clients whose memory is too small for the round's work"),
    "rounds/unavailable": Column("1", "clients that were drawn and were not there"),
    "rounds/staleness": Column("1", "server steps since the model that an answer was trained from, mean over the answers"),
    "clients/seconds": Column("s", "virtual time from the request to the answer, over all exchanges of the round"),
    "clients/begun": Column("s", "virtual time from the beginning of the round to the first request; negative: in an earlier round"),
    "clients/ended": Column("s", "virtual time from the beginning of the round to the last answer"),
    "clients/joules": Column("J", "used by the client's device, waiting for the end of the round included"),
    "clients/status": Column("1", STATUS),
    "clients/batch_halvings": Column("1", "how often the batch was halved to fit the memory"),
}
"""What emulated devices add; a column is made when it is first recorded."""

OF_METHODS: dict[str, Column] = {
    "rounds/server_flops_pretraining": Column("FLOP", "of server_flops: training on the public images before round 1"),
    "rounds/server_flops_hypernetworks": Column("FLOP", "of server_flops: forward and backward passes of hypernetworks"),
    "rounds/server_flops_scoring": Column("FLOP", "of server_flops: scores of weights by which they are pruned before round 1"),
    "rounds/weights_swapped": Column("1", "weights that left and as many that entered the masks in an adjustment"),
    "rounds/adjusted_block": Column("1", "block of layers that was adjusted, 1 nearest the input"),
    "rounds/target_density": Column("1", "d_t of a density that falls over the rounds; masks follow it in rounds that adjust them"),
    "rounds/empty_layers": Column("1", "masked layers that keep no weight at all: one ranking of all layers together may empty some"),
    "rounds/norm_penalty": Column("1", "lambda_t, strength of the penalty on the L2 norms of masked layers"),
    "rounds/marked_norm_before": Column("1", "L2 norm of the marked weights when an extrusion begins, in the broadcast"),
    "rounds/marked_norm_after": Column("1", "the same in the average of what the clients then trained"),
    "rounds/candidates": Column("1", "models that the clients chose from"),
    "rounds/chosen_candidate": Column("1", "the chosen one, counted from 1"),
    "rounds/candidate_loss": Column("nat", "mean cross-entropy of the chosen one over the clients' images of the selection"),
    "rounds/pool_loss": Column("nat", "the same, its mean over all candidates"),
    "rounds/importance_per_second": Column("1/s", "squared gradients of what the chosen masks keep, over the modelled seconds of a round"),
    "rounds/modelled_seconds": Column("s", "what a round takes under the chosen masks, by the time model of the method"),
    "rounds/initial_iterations": Column("1", "local steps of the stage at one client that precedes round 1"),
    "rounds/base_flops_share": Column("1", "T / T_tot: FLOPs of the gated layers that the base keeps, over all of theirs"),
    "rounds/client_flops_share": Column("1", "the same of what a client of the cohort uses, their mean"),
    "rounds/inference_share": Column("1", "one forward pass of the server's cut or gated model over one of the original network"),
    "rounds/parameters": Column("1", "parameters of the server's model that are left after a cut, or that its gates leave open"),
    "rounds/parameters_share": Column("1", "the same over those of the original network"),
    "rounds/client_inference_flops": Column("FLOP", "one forward pass of a client's sub-network for one image, mean over clients"),
    "rounds/client_inference_share": Column("1", "the same over one forward pass of the original network"),
    "rounds/client_parameters": Column("1", "parameters of a client's sub-network, mean over clients"),
    "rounds/client_overlap": Column("1", "channels that two clients' sub-networks share over those that either has, mean over pairs"),
    "rounds/mask_agreement": Column("1", "adjusted layers: weights that all clients of the cohort keep over those that any keeps"),
    "rounds/worst_client": Column("1", "number of the client of lowest accuracy on its test shard, the first of equals"),
    "rounds/client_global_accuracy": Column("1", "accuracy of a client's own network on the global test set, mean over clients"),
    "rounds/deploy_flops": Column("FLOP", "what clients do after the last round to get the network they use, all together; on no bill"),
    "rounds/nominal_convs_share": Column("1", "convolutions' FLOPs with as many channels open as may be, over the ungated ones"),
    "rounds/nominal_share": Column("1", "the same of the whole network, gates added, over the network without gates"),
    "rounds/active_convs_share": Column("1", "convolutions' FLOPs of the channels that are open, mean over the clients' training images"),
    "rounds/active_share": Column("1", "the same of the whole network, gates added, over the network without gates"),
    "rounds/varying_share": Column("1", "channels that some of a client's images open and others do not, mean over images"),
    "rounds/export_share": Column("1", "FLOPs of an exported network over the network without gates"),
    **{f"rounds/{form}_{name}": Column(unit, f"{about}, {way}") for form, way in FORMS.items() for name, (unit, about) in FORM.items()},
    **{f"clients/{form}_accuracy": Column("1", f"accuracy on its own test shard, {way}") for form, way in FORMS.items()},
    "clients/global_accuracy": Column("1", "accuracy of the client's own network on the global test set"),
    "rounds/client_density": Column("1", "kept conv and linear weights of a client of the cohort over all of them, mean over clients"),
    "rounds/clients_pruned": Column("1", "clients of the cohort that pruned their own masks in the round"),
    "rounds/held_accuracy": Column("1", "right over all held-out images of the cohort, by the clients' models before they prune and train"),
    **{
        f"rounds/averaged_{name}": Column(unit, f"{about}, in the averaged model that no client has fine-tuned")
        for name, (unit, about) in FORM.items()
    },
    "clients/averaged_accuracy": Column("1", "accuracy on its own test shard, in the averaged model that no client has fine-tuned"),
    "rounds/client_conv_density": Column("1", "convolution weights of a client that are not 0, mean over clients"),
    "rounds/client_conv_density_layers": Column("1", "the same, every convolution counted alike"),
    "rounds/server_conv_density": Column("1", "convolution weights of the server's model that are not 0"),
    "rounds/server_conv_density_layers": Column("1", "the same, every convolution counted alike"),
    "rounds/bytes_up_indexed": Column("B", "what would be sent up with an index and a value for each convolution weight that is not 0"),
    "rounds/bytes_down_indexed": Column("B", "the same, down"),
    "rounds/mean_width_rate": Column("1", "share of the channels that a client of the cohort trains, mean over clients"),
    "rounds/untouched_share": Column("1", "weights, biases and norm entries that no client of the cohort trains, over all of them"),
    "rounds/uploads": Column("1", "clients of the cohort that upload what they trained"),
    "clients/inference_flops": Column("FLOP", "one forward pass of the client's sub-network for one image"),
    "clients/parameters": Column("1", "parameters of the client's sub-network"),
    "clients/gates_open": Column("1", "share of the gates of the client's own network that are open"),
}
"""What methods share the names of; a column is made when a method first records it."""

ATTRIBUTES: dict[str, tuple[str, str]] = {
    "format_version": ("whole number", "of the layout of the file; a newer one than the reader knows is refused"),
    "rounds": ("whole number", "the last complete round, -1 before round 0: later rows are not to be used"),
    "finished": ("0 or 1", "1 when the run has done all its rounds"),
    "rounds_planned": ("whole number", "rounds of the job"),
    "job": ("TOML", "the resolved job: every field, defaults too"),
    "job_sha256": ("hash", "of the job, without what changes no result"),
    "method": ("text", "name of the method"),
    "seed": ("whole number", "of the job"),
    "plan": ("JSON", "how the run is computed: fleet, packs, layout, kernels"),
    "partition": ("JSON", "who holds which images: scheme, parameters, hashes of the parts"),
    "partition_sha256": ("hash", "of the images of each client"),
    "data_sha256": ("hash", "of the images and labels of the data set"),
    "own_code_sha256": ("hash", "of modules of the user's own; empty where there are none"),
    "devices": ("JSON", "the kinds of the clients' devices, in the order of /devices/kind; only where clients have devices"),
    "weights_sha256": ("hash", "of the final weights; blank until the run is finished"),
    "fedsim_version": ("text", "of the fedsim that began the run"),
    "git_commit": ("text", "of its checkout; empty where it was installed from a package"),
    "torch_version": ("text", "of the torch that ran last"),
    "started_at": ("text", "when the run began, UTC"),
    "hosts": ("text", "machines of the ranks, sorted, with commas between them"),
    "ranks": ("whole number", "MPI ranks, the server's included"),
    "peak_flops": ("FLOP/s", "what one rank reaches at most in arithmetic, as measured"),
    "peak_bytes": ("B/s", "what one rank reaches at most in memory traffic, as measured"),
    "crc32": ("JSON", "checksums of these attributes, and of the arrays that are written once"),
    "mended": ("text", "what `fedsim doctor --mend` could not keep; only in mended files"),
}
"""The attributes of a run file: type or unit, and meaning."""

ARRAYS: dict[str, tuple[str, str]] = {
    "/round": ("(rounds,)", "numbers of the rounds, from 0"),
    "/client": ("(clients,)", "numbers of the clients, from 0"),
    "/layer": ("(layers,)", "names of the layers that may have a mask or a gate"),
    "/partition/class": ("(classes,)", "numbers of the classes, from 0"),
    "/partition/counts": ("(clients, classes)", "training images: who holds what; left out above 100,000 clients"),
    "/partition/client_name, class_name": ("(clients,), (classes,)", "names, where the data set has some"),
    "/devices/kind": ("(clients,)", "number of the kind of each client's device, where clients have devices"),
    "/masks/ROUND": (
        "(bytes,)",
        "the masks that are in force from that round on, as packed bits, the first entry in the highest bit. Its attribute `tensors` is"
        " JSON of each mask and its shape; each mask begins at a byte",
    ),
    "/client_gates/ROUND/gates": ("(K, bytes)", "hard gates of K clients, from that round on, as packed bits; of `final`: at the end"),
    "/client_gates/ROUND/clients": ("(K,)", "whose they are"),
    "/client_gates/ROUND/values": ("(K, gates)", "the constants that replace dynamic gates, where a method folds them"),
    "/model/KEY": (
        "(entries,)",
        "final weights (w/…), buffers (buf/…), masks (mask/…, packed bits). The attributes `dtype` and `shape` are those of the tensor;"
        " where `masked` is 1, only the entries stand here that the mask keeps",
    ),
    "/checksums/columns": ("(columns,)", "columns that have checksums, and `masks` and `client_gates`"),
    "/checksums/rows": ("(rounds, columns)", "CRC-32 of each of their rows"),
    "/checksums/about": ("(columns,)", "CRC-32 of the unit and the description of each"),
}
"""What else a run file holds beside its columns: shape, and meaning."""
