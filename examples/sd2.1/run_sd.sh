#!/usr/bin/env bash
# Stable Diffusion 2.1: sets up the environment when needed, then makes pictures.
# Usage: bash examples/sd2.1/run_sd.sh                    the demo: all accelerations on, compared with a plain run
#        bash examples/sd2.1/run_sd.sh --prompt "..."     any options of run_sd.py; --help lists them
#        bash examples/sd2.1/run_sd.sh --device_list=0,1 --model_path=...     on several devices, a process for each
# --device_list=0,1   the two chips of a 310P Duo card, or other NPUs or GPUs; on a CPU, as many processes; counted
#                     within ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES where a scheduler has set them
# --cann_path=DIR     sources DIR/set_env.sh first
# --rdzv_endpoint=HOST:PORT --nnodes=N --node_rank=0   for several machines, or a port of your own; see launch.py
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
if (($# == 0)); then
    set -- --FA --TOME --DC --dynamo --compare
fi

device_list=
cann_path=
launcher=() # what concerns the launcher of several processes
arguments=()
while (($#)); do
    case $1 in
        --device_list | --cann_path | --rdzv_endpoint | --nnodes | --node_rank)
            (($# > 1)) || { echo "error: $1 needs a value" >&2; exit 2; }
            set -- "$1=$2" "${@:3}"
            ;;
    esac
    case $1 in
        --device_list=*) device_list=${1#*=} ;;
        --cann_path=*) cann_path=${1#*=} ;;
        --rdzv_endpoint=* | --nnodes=* | --node_rank=*) launcher+=("$1") ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

cann_path=${cann_path/#\~\//$HOME/} # which the shell leaves as it is behind an equals sign
if [[ $cann_path ]]; then
    if [[ ! -f $cann_path/set_env.sh ]]; then
        echo "error: --cann_path $cann_path: there is no set_env.sh in it" >&2
        exit 2
    fi
    set +u  # CANN's script reads variables that may be unset
    # shellcheck disable=SC1091
    source "$cann_path/set_env.sh"
    set -u
fi

python=$(bash "$here/../../scripts/setup_env.sh")
if [[ $device_list == *,* ]] || ((${#launcher[@]})); then
    launcher+=("--device_list=${device_list:-0}")
    exec "$python" "$here/../launch.py" "${launcher[@]}" -- "$here/run_sd.py" "${arguments[@]}"
fi
if [[ $device_list ]]; then # as narrow_visible_devices of ascend.device, which the launcher uses
    if [[ ! $device_list =~ ^[0-9]+$ ]]; then
        echo "error: --device_list $device_list: this is no list of numbers such as 0,1" >&2
        exit 2
    fi
    for variable in ASCEND_RT_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES; do
        IFS=, read -ra visible <<<"${!variable-}"
        if [[ ! ${!variable+set} ]]; then
            export "$variable=$device_list"
        elif ((device_list < ${#visible[@]})); then # numbers count within what a scheduler has set
            export "$variable=${visible[device_list]}"
        elif [[ ${!variable} ]]; then
            echo "error: device $device_list: $variable=${!variable} was set before, by a scheduler perhaps, and has" \
                "no such device; numbers count within it, from 0" >&2
            exit 2
        fi
    done
fi
exec "$python" "$here/run_sd.py" "${arguments[@]}"
