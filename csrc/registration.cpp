// The schemas of torch.ops.moekv. Implementations register themselves in csrc/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moekv, m) {
  m.def(
      "gating_topk(Tensor logits, Tensor? bias=None, Tensor? mask=None, "
      "Tensor? importance=None, *, SymInt k, float temperature=1.0) "
      "-> (Tensor weights, Tensor experts, Tensor prob_sum, Tensor load, Tensor entropy)");
  m.def(
      "expert_scores(Tensor keys, Tensor values, Tensor queries, Tensor? start=None, *, "
      "int[] kinds, float scaling, float softcap=0.0, SymInt pool=1, SymInt lag=128) "
      "-> Tensor scores");
  m.def(
      "expected_attention(Tensor queries, Tensor keys, Tensor? start=None, Tensor? cos=None, "
      "Tensor? sin=None, *, float scaling=1.0, float softcap=0.0) -> Tensor scores");
  m.def(
      "project_tokens(Tensor hidden_states, Tensor weight, Tensor? mask=None) -> (Tensor "
      "projected, "
      "Tensor standout)");
  m.def(
      "mix_scores(Tensor scores, Tensor weights, Tensor experts, Tensor? gain=None, "
      "Tensor? offset=None) -> Tensor mixed");
  m.def(
      "select_kept(Tensor scores, Tensor? start=None, *, SymInt[] total, SymInt sinks=0, "
      "SymInt window=0, SymInt floor=1) -> (Tensor indices, Tensor offsets)");
  m.def(
      "kv_compact_(Tensor(a!) keys, Tensor(b!) values, Tensor indices, Tensor? offsets=None, *, "
      "bool packed=False) -> ()");
  m.def(
      "quantize_pairs(Tensor keys, Tensor values, *, str pairs) "
      "-> (Tensor key_codes, Tensor value_codes, Tensor scales)");
  m.def(
      "fold_pairs(Tensor queries, Tensor keys, Tensor values, Tensor indices, Tensor offsets, "
      "Tensor? start=None, *, float scaling, float softcap=0.0, float gate=0.0, float least=0.0) "
      "-> (Tensor folded, Tensor bias, Tensor joined)");
  m.def(
      "ragged_attention(Tensor query, Tensor keys, Tensor values, Tensor begin, Tensor end, "
      "Tensor? tail_keys=None, Tensor? tail_values=None, Tensor? mask=None, Tensor? scales=None, "
      "Tensor? bias=None, Tensor? sinks=None, *, float scaling, float softcap=0.0, "
      "str pairs=\"16\") -> Tensor output");
}
