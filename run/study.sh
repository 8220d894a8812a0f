#!/usr/bin/env bash
# The questions of the paper (arXiv 2510.10150) at the size of a laptop: trains what a part compares, over three seeds,
# one run after another, and ends with the part's table, picture and page. docs/study.md reports the results. Finished
# runs are not repeated, and parts share their runs; further arguments are Hydra overrides for all runs:
#   bash run/study.sh
#   PARTS="quadrants maps" SEEDS="1 2 3" bash run/study.sh trainer.total_training_steps=60
#   bash run/study.sh --list      # print each run's name, configuration and overrides, and train nothing
#   PARTS       collapse     on the countdown task: GRPO and an entropy bonus, the criteria of docs/task_choice.md
#               field        on the countdown task: the methods of docs/interventions.md, STEER and the control
#               sweep        field's methods with half and twice the learning rate and, where they have one, with a
#                            lower and a higher coefficient; alone, with a seed of its own, such as SEEDS=47. Writes
#                            the setting of each method with the greatest pass@8 to OUTPUT_DIR/chosen.txt
#               chosen       the runs that OUTPUT_DIR/chosen.txt names
#               sign         weights by the size of the estimate `exact`, by its sign with a strength that stays the
#                            same, and OPEFO, which adapts it
#               classes      GTPO and GRPO-S with rewards of right and wrong answers standardised apart, and together
#               unlikely     less loss for unlikely tokens of wrong answers, and none
#               trainability the models that field's runs end with, trained by GRPO on problems made without sums
#               continued    the same models, trained on by GRPO on the countdown task
#               stable       GRPO's model trained by GRPO and STEER on numbers up to 12, where its entropy does not fall
#               learned_reward GRPO, STEER and the control with the reward of a model in place of the rule's
#               countdown_lambda_min and the like: lambda_min, extreme, quadrants, maps, normalizers or lora, below, on
#                            the countdown task
#               fidelity     estimated against true changes of the entropy
#               methods      GRPO, clip-higher, Clip-Cov, KL-Cov, an entropy bonus, STEER with either map
#               lambda_min   the least token weight from 0.5 to 0.8
#               extreme      almost no clipping, with and without STEER
#               quadrants    tokens of either sign of the advantage, likely or not, raised and lowered
#               maps         exponential, linear, threshold
#               normalizers  micro_batch, global, ema
#               lora         GRPO and STEER with full fine-tuning and LoRA: does the estimate hold?
#               prediction   predicted against true changes by whole updates, over learning rates; and single tokens
#               control      entropy held at targets by influence; by plain controllers, an adaptive bonus and GRPO
#               control_others  `pi_released`, `pi_exact` and `adaptive_entropy` at targets of 0.35 and 0.2
#               default: fidelity methods lambda_min extreme
#   SEEDS       seeds of the data order and the rollouts ("42 43 44")
#   OUTPUT_DIR  where results go (outputs/study in the repository): runs as seed42/steer_exp, a part's results as
#               methods.md, methods.png and methods/report.html
#   TASK_DIR    what scripts/make_laptop_task.py made, for all runs (made in OUTPUT_DIR: task with 1,024 test problems
#               of arithmetic, countdown, second, of problems without sums, and stable, of numbers up to 12)
#   PYTHON      interpreter (that of the environment made by setup.sh)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"

# NAME of field: the key of its coefficient, a lower value and a higher one: half and twice its own, or less far where
# it has bounds; half and twice its distance from 1 for lambda_min, 0.05 less and more for entropies to keep, and the
# other published values of CE-GPPO.
coefficient() {
  local actor=actor_rollout_ref.actor loss=actor_rollout_ref.actor.policy_loss
  case $1 in
    steer_asymmetric) echo $loss.token_weight_min 0.8 0.95 ;;
    steer_*) echo $loss.token_weight_min 0.6 0.9 ;;
    influence_band) echo $loss.entropy_band 0.0005 0.002 ;;
    influence_* | pi_exact | adaptive | entropic) echo $loss.target_entropy 0.15 0.25 ;;
    aepo) echo algorithm.aepo_entropy 0.15 0.25 ;;
    entrocraft) echo algorithm.entropy_lower_end 0.1 0.2 ;;
    siren) echo $loss.siren_coeff 0.0025 0.01 ;;
    bonus_*) echo $actor.entropy_coeff 0.005 0.02 ;;
    clip_cov) echo $loss.clip_cov_ratio 0.0001 0.0004 ;;
    kl_cov) echo $loss.ppo_kl_coef 0.5 2.0 ;;
    clip_b) echo algorithm.clip_b_mu 1.25 5.0 ;;
    clip_v) echo $loss.clip_v_mu 4.25 17.0 ;;
    ce_gppo) echo $loss.ce_gppo_beta1 0.5 1.0 ;;
    bapo) echo $loss.bapo_share 0.4 0.6 ;;
    archer) echo $loss.archer_clip_reasoning 0.25 0.9 ;;
    dynamic_clip) echo $loss.dynamic_clip_high 0.1 0.4 ;;
    high_entropy_tokens) echo $loss.high_entropy_share 0.1 0.4 ;;
    quadrant) echo $loss.quadrant_weight 0.25 0.75 ;;
    entropy_shaped_advantage) echo $loss.advantage_entropy_alpha 0.2 0.8 ;;
    positive_advantage) echo $loss.positive_advantage_weight 0.25 0.75 ;;
    w_reinforce) echo algorithm.positive_weight 0.05 0.2 ;;
    unlikeliness) echo algorithm.unlikeliness_beta 0.125 0.5 ;;
    gtpo | grpo_s) echo algorithm.entropy_reward_share 0.05 0.2 ;;
  esac
}

# The runs of sweep.
swept() {
  local name values
  for name in $(members field); do
    echo "$name" "${name}"_lr{5e-5,2e-4}
    read -ra values <<<"$(coefficient "${name#countdown_}")"
    printf '%s\n' "${values[@]:1}" | sed "s/^./${name}_coefficient&/"
  done
}

# The runs that a part compares.
members() {
  case $1 in
    collapse) echo countdown_{grpo,bonus_0.003,bonus_0.01,bonus_0.03} ;;
    field) echo countdown_{grpo,grpo_symmetric,steer_exp,steer_linear,steer_asymmetric,steer_rank,steer_winsorised} \
      countdown_{steer_exact,steer_rank_exact,influence_0.2,influence_band,pi_exact,adaptive,entropic,entrocraft,aepo,siren} \
      countdown_{bonus_0.01,clip_cov,kl_cov,clip_b,clip_v,opefo,ce_gppo,bapo,archer,dynamic_clip,high_entropy_tokens} \
      countdown_{quadrant,entropy_shaped_advantage,positive_advantage,psr,nsr,w_reinforce,unlikeliness,gtpo,grpo_s} ;;
    sweep) swept ;;
    chosen) cat "$OUTPUT_DIR/chosen.txt" 2>/dev/null ||
      { echo "study.sh: PARTS=chosen: no $OUTPUT_DIR/chosen.txt; expected that PARTS=sweep has ended" >&2; return 1; } ;;
    sign) echo countdown_{grpo,steer_rank_exact,opefo_0.05,opefo_0.09,opefo} ;;
    classes) echo countdown_{grpo,{gtpo,grpo_s}{,_together}} ;;
    unlikely) echo countdown_{grpo,negative_unlikely_{0.75,0.5,0.25,0.0}} ;;
    trainability) echo {countdown,second}_{grpo,steer_exp,unlikeliness,opefo,pi_exact,influence_0.2} ;;
    continued) echo {countdown,continued}_{grpo,steer_exp,unlikeliness,opefo,pi_exact,influence_0.2} ;;
    stable) echo countdown_grpo stable_{grpo,steer_exp} ;;
    learned_reward) echo learned_{grpo,steer_exp,influence_0.2,bonus_0.01} ;;
    countdown_lambda_min | countdown_extreme | countdown_quadrants | countdown_maps | countdown_normalizers | \
      countdown_lora)
      members "${1#countdown_}" | sed -E 's/\<clip_higher/grpo/g; s/[^ ]+/countdown_&/g' ;;
    fidelity) echo grpo_symmetric steer_exp steer_exp_extreme ;;
    methods) echo grpo_symmetric clip_higher clip_cov kl_cov entropy_bonus steer_exp steer_linear ;;
    lambda_min) echo clip_higher steer_exp_0.5 steer_exp_0.6 steer_exp_0.7 steer_exp ;;
    extreme) echo clip_higher steer_exp grpo_extreme steer_exp_extreme steer_linear_extreme ;;
    quadrants) echo clip_higher {positive,negative}_{likely,unlikely}_{0.5,1.5} ;;
    maps) echo clip_higher steer_exp steer_linear steer_threshold ;;
    normalizers) echo clip_higher steer_exp steer_global steer_ema ;;
    lora) echo {clip_higher,steer_exp}{,_lora} ;;
    prediction) echo prediction_{1e-6,5e-6,2e-5,1e-4,5e-4} single_tokens ;;
    control) echo grpo_1e-4 influence_{0.35,0.27,0.2,steps} {pi_released,pi_exact,adaptive}_0.27 ;;
    control_others) echo {pi_released,pi_exact,adaptive}_{0.35,0.2} ;;
    *) echo "study.sh: PARTS names $1; expected collapse, field, sweep, chosen, sign, classes, unlikely, trainability," \
      "continued, stable, learned_reward, fidelity, methods, lambda_min, extreme, quadrants, maps, normalizers, lora" \
      "(these six also as countdown_lambda_min and so on), prediction, control or control_others" >&2; return 1 ;;
  esac
}

# METHOD START: from the model that START ends with on the countdown task.
after() {
  local run="\${oc.env:OUTPUT_DIR}/seed${seed:-N}/countdown_$2" # not its value, which may have spaces
  echo "$1 actor_rollout_ref.model.path=$run/global_step_250/actor/huggingface" \
    "trainer.total_training_steps=100 trainer.save_freq=-1"
}

# A run's configuration, and its overrides where it has any: NAME [audit of the runs that have one].
definition() {
  local actor=actor_rollout_ref.actor audit=${2-trainer.entropy_audit.freq=3}
  local loss=$actor.policy_loss model=actor_rollout_ref.model lr=$actor.optim.lr
  local key target=$loss.target_entropy forty="trainer.total_training_steps=40 trainer.test_freq=20"
  case $1 in
    countdown_*_lr*) echo "$(definition "${1%_lr*}") $lr=${1##*_lr}" ;;
    countdown_*_coefficient*)
      read -r key _ <<<"$(coefficient "$(sed -E 's/^countdown_(.*)_coefficient.*/\1/' <<<"$1")")"
      echo "$(definition "${1%_coefficient*}" | sed "s/ $key=[^ ]*//") $key=${1##*_coefficient}" ;;
    countdown_clip_cov) echo clip_cov ;;
    countdown_bonus_*) echo "entropy_bonus $actor.entropy_coeff=${1##*_}" ;;
    countdown_*_together) echo "$(definition "${1%_together}") algorithm.entropy_reward_by_class=false" ;;
    countdown_influence_band) echo influence_band ;;
    countdown_opefo_*) echo "opefo $loss.opefo_lambda=${1##*_}" ;;
    countdown_steer_rank_exact) echo "steer_rank $loss.entropy_change_estimator=exact" ;;
    countdown_influence_*) echo "influence_target $target=${1##*_}" ;;
    countdown_adaptive) echo "adaptive_entropy $target=0.2 $loss.entropy_coeff_step=0.001" \
      "$loss.entropy_coeff_max=0.05" ;;
    countdown_pi_exact | countdown_entropic) echo "${1#countdown_} $target=0.2" ;;
    countdown_aepo) echo "aepo algorithm.aepo_entropy=0.2" ;;
    countdown_entrocraft) echo entrocraft algorithm.entropy_lower_{start=0.25,end=0.15} \
      algorithm.entropy_upper_{start=0.3,end=0.25} ;;
    countdown_*) definition "${1#countdown_}" "" ;;
    learned_*) definition "countdown_${1#learned_}" ;;
    second_* | continued_*) after grpo "${1#*_}" ;;
    stable_*) after "${1#stable_}" grpo ;;
    grpo_symmetric | steer_exp | steer_exp_extreme) echo "$1${audit:+ $audit}" ;;
    clip_cov) echo "$1 $actor.clip_ratio_low=0.2 $actor.clip_ratio_high=0.28" ;; # those of the part's other methods
    entropy_bonus) echo "$1 $actor.entropy_coeff=0.01" ;;
    grpo_extreme) echo "grpo $actor.clip_ratio_low=0.99 $actor.clip_ratio_high=5.0" ;;
    steer_exp_0.*) echo "steer_exp $loss.token_weight_min=${1#steer_exp_}" ;;
    *tive_likely_* | *tive_unlikely_*) echo "quadrant $loss.quadrant=${1%_*} $loss.quadrant_weight=${1##*_}" ;;
    prediction_*) echo "grpo $lr=${1#prediction_} trainer.entropy_audit.freq=1 trainer.entropy_audit.influence=true" \
      "trainer.total_training_steps=11 trainer.val_before_train=false" ;;
    single_tokens) echo "grpo $lr=2e-5 trainer.entropy_audit.freq=6 trainer.entropy_audit.influence=true" \
      "trainer.entropy_audit.one_token=200 trainer.total_training_steps=6 trainer.val_before_train=false" ;;
    grpo_1e-4) echo "grpo $lr=1e-4 $forty" ;;
    influence_steps) echo "influence_target $lr=1e-4 $target={1:0.35,21:0.2,41:0.3}" \
      "trainer.total_training_steps=60 trainer.test_freq=20" ;;
    influence_*) echo "influence_target $lr=1e-4 $target=${1#influence_} $forty" ;;
    pi_*) echo "${1%_*} $lr=1e-4 $target=${1##*_} $forty" ;;
    adaptive_*) echo "adaptive_entropy $lr=1e-4 $target=${1#adaptive_} $loss.entropy_coeff_step=0.01" \
      "$loss.entropy_coeff_max=0.2 $forty" ;;
    # merged, since the CPU's vLLM is not given adapters
    *_lora) echo "$(definition "${1%_lora}" "$audit") $model.lora_rank=8 $model.lora_alpha=16 $model.lora.merge=true" ;;
    *) echo "$1" ;;
  esac
}

export OUTPUT_DIR=${OUTPUT_DIR:-$root/outputs/study}
parts=${PARTS:-fidelity methods lambda_min extreme} seeds=${SEEDS:-42 43 44}
names=$(for part in $parts; do members "$part" || exit 1; done)
if [ "${1:-}" = --list ]; then
  for name in $(tr ' ' '\n' <<<"$names" | awk '!seen[$0]++'); do echo "$name: $(definition "$name")"; done
  exit 0
fi

for word in "$@"; do
  case $word in -*) echo "study.sh: $word: expected --list, or Hydra overrides without flags" >&2; exit 1 ;; esac
done
if [[ " $parts " = *" sweep "* ]] && { [ "$parts" != sweep ] || [ -z "${SEEDS:-}" ]; }; then
  echo "study.sh: PARTS=$parts: expected sweep alone, and SEEDS with a seed that no other part uses, such as SEEDS=47" >&2
  exit 1
fi
if [ -z "${PYTHON:-}" ]; then
  bash "$root/run/setup.sh"
  export PYTHON=${STEER_VENV:-$root/.venv}/bin/python
fi
# The folder of a task, made where the user names none. The models of second and stable are not used.
task_folder() {
  local folder=$1 options=(--task countdown)
  case $1 in
    arithmetic) folder=task options=(--test-size 1024) ;;
    learned) folder=countdown ;;
    second) options+=(--difficulty 7 --steps 1) ;;
    stable) options+=(--difficulty 6 --steps 1) ;;
  esac
  if [ -z "${TASK_DIR:-}" ]; then
    "$PYTHON" "$root/scripts/make_laptop_task.py" --out "$OUTPUT_DIR/$folder" "${options[@]}" >/dev/null || exit 1
  fi
  echo "${TASK_DIR:-$OUTPUT_DIR/$folder}"
}

for seed in $seeds; do
  for name in $names; do
    read -ra words <<<"$(definition "$name")"
    task=arithmetic data=arithmetic length=(trainer.total_training_steps=30)
    case $name in
      countdown_* | second_* | stable_*) task=countdown data=${name%%_*} length=() ;;
      continued_*) task=countdown data=countdown length=() ;;
      learned_*) task=countdown_learned data=learned length=() ;;
    esac
    folder=$(task_folder "$data")
    if [ "$data" = learned ] && [ ! -f "$folder/reward_model/tokenizer.json" ]; then # the last file to be written
      "$PYTHON" "$root/scripts/make_reward_model.py" --task-dir "$folder"
    fi
    TASK_DIR=$folder bash "$root/run/train_once.sh" "$OUTPUT_DIR/seed$seed/$name" "${words[0]}" task="$task" \
      hardware=cpu +seed="$seed" "${length[@]}" "${words[@]:1}" "$@"
  done
done

for part in $parts; do
  runs=()
  for seed in $seeds; do
    for name in $(members "$part"); do
      # runs of another task, from whose models those of the part begin
      [[ $part =~ ^(trainability|continued|stable)$ && $name = countdown_* ]] || runs+=("$OUTPUT_DIR/seed$seed/$name")
    done
  done
  echo "$part"
  options=()
  case $part in
    collapse | field | sweep | sign | classes | unlikely) options=(--baseline countdown_grpo) ;;
    trainability) options=(--baseline second_grpo --reach -0.2) ;; # 40 % right
    chosen) options=(--baseline "$(grep -xE 'countdown_grpo(_lr.*)?' "$OUTPUT_DIR/chosen.txt")") ;;
    continued | stable) options=(--baseline "${part}_grpo") ;;
    countdown_lora) options=(--baseline countdown_grpo_lora) ;;
    learned_reward) options=(--baseline learned_grpo) ;;
    countdown_*) options=(--baseline countdown_grpo) ;;
  esac
  "$PYTHON" "$root/scripts/compare_runs.py" "${runs[@]}" ${options[@]+"${options[@]}"} --out "$OUTPUT_DIR/$part.png" \
    --markdown "$OUTPUT_DIR/$part.md"
  "$PYTHON" "$root/scripts/report.py" "${runs[@]}" --out "$OUTPUT_DIR/$part"
  if [ "$part" = sweep ]; then
    "$PYTHON" "$root/scripts/choose_settings.py" "${runs[@]}" --out "$OUTPUT_DIR/chosen.txt"
  fi
done
