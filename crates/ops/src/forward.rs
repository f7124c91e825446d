//! Back ends that wrap another one and change a few of its methods hand the others on, with [`forward_backend!`].

/// Methods of [`Backend`](crate::Backend) that call the same method of a field, by name: `forward_backend!(inner: caps alloc free)`
/// stands in an `impl Backend` whose type has a field `inner` that is a back end, boxed or borrowed. What is not named stays to be
/// written, or has the trait's default.
#[macro_export]
macro_rules! forward_backend {
    ($field:ident: $($method:ident)*) => { $($crate::forward_backend!(@ $field $method);)* };
    (@ $field:ident caps) => {
        fn caps(&self) -> &$crate::Caps {
            self.$field.caps()
        }
    };
    (@ $field:ident alloc) => {
        fn alloc(&mut self, what: &str, element: $crate::ElementType, len: usize) -> $crate::Result<$crate::Buffer> {
            self.$field.alloc(what, element, len)
        }
    };
    (@ $field:ident free) => {
        fn free(&mut self, buffer: $crate::Buffer) {
            self.$field.free(buffer);
        }
    };
    (@ $field:ident write_f32) => {
        fn write_f32(&mut self, dst: $crate::Tensor, src: &[f32]) -> $crate::Result<()> {
            self.$field.write_f32(dst, src)
        }
    };
    (@ $field:ident write_u32) => {
        fn write_u32(&mut self, dst: $crate::Tensor, src: &[u32]) -> $crate::Result<()> {
            self.$field.write_u32(dst, src)
        }
    };
    (@ $field:ident read_f32) => {
        fn read_f32(&mut self, src: $crate::Tensor, dst: &mut [f32]) -> $crate::Result<()> {
            self.$field.read_f32(src, dst)
        }
    };
    (@ $field:ident read_u32) => {
        fn read_u32(&mut self, src: $crate::Tensor, dst: &mut [u32]) -> $crate::Result<()> {
            self.$field.read_u32(src, dst)
        }
    };
    (@ $field:ident synchronize) => {
        fn synchronize(&mut self) -> $crate::Result<()> {
            self.$field.synchronize()
        }
    };
    (@ $field:ident measure_read) => {
        fn measure_read(&mut self) -> $crate::Result<Option<f64>> {
            self.$field.measure_read()
        }
    };
    (@ $field:ident alloc_cache) => {
        fn alloc_cache(
            &mut self,
            what: &str,
            dtype: $crate::CacheDtype,
            num_slots: usize,
            width: usize,
        ) -> $crate::Result<$crate::Cache> {
            self.$field.alloc_cache(what, dtype, num_slots, width)
        }
    };
    (@ $field:ident read_cache) => {
        fn read_cache(&mut self, cache: $crate::Cache, first_slot: usize, dst: &mut [u8]) -> $crate::Result<()> {
            self.$field.read_cache(cache, first_slot, dst)
        }
    };
    (@ $field:ident write_cache) => {
        fn write_cache(&mut self, cache: $crate::Cache, first_slot: usize, src: &[u8]) -> $crate::Result<()> {
            self.$field.write_cache(cache, first_slot, src)
        }
    };
    (@ $field:ident load_weight) => {
        fn load_weight(&mut self, source: &$crate::WeightSource<'_>) -> $crate::Result<$crate::Weight> {
            self.$field.load_weight(source)
        }
    };
    (@ $field:ident load_experts) => {
        fn load_experts(&mut self, source: &$crate::ExpertsSource<'_>) -> $crate::Result<$crate::Experts> {
            self.$field.load_experts(source)
        }
    };
    (@ $field:ident stage) => {
        fn stage(&mut self, stage: $crate::Stage) {
            self.$field.stage(stage);
        }
    };
    (@ $field:ident embed) => { $crate::forward_backend!(@ $field embed($crate::Embed)); };
    (@ $field:ident rope_table) => { $crate::forward_backend!(@ $field rope_table($crate::RopeTable)); };
    (@ $field:ident rms_norm) => { $crate::forward_backend!(@ $field rms_norm($crate::RmsNorm)); };
    (@ $field:ident layer_norm) => { $crate::forward_backend!(@ $field layer_norm($crate::LayerNorm)); };
    (@ $field:ident linear) => { $crate::forward_backend!(@ $field linear($crate::Linear<'_>)); };
    (@ $field:ident linear_heads) => { $crate::forward_backend!(@ $field linear_heads($crate::LinearHeads)); };
    (@ $field:ident rope) => { $crate::forward_backend!(@ $field rope($crate::Rope)); };
    (@ $field:ident kv_store) => { $crate::forward_backend!(@ $field kv_store($crate::KvStore<'_>)); };
    (@ $field:ident attend_gqa) => { $crate::forward_backend!(@ $field attend_gqa($crate::AttendGqa)); };
    (@ $field:ident attend_mla) => { $crate::forward_backend!(@ $field attend_mla($crate::AttendMla)); };
    (@ $field:ident index_score) => { $crate::forward_backend!(@ $field index_score($crate::IndexScore)); };
    (@ $field:ident index_topk) => { $crate::forward_backend!(@ $field index_topk($crate::IndexTopk)); };
    (@ $field:ident route) => { $crate::forward_backend!(@ $field route($crate::Route)); };
    (@ $field:ident moe_gate_up) => { $crate::forward_backend!(@ $field moe_gate_up($crate::MoeGateUp)); };
    (@ $field:ident moe_down) => { $crate::forward_backend!(@ $field moe_down($crate::MoeDown)); };
    (@ $field:ident gate_up) => { $crate::forward_backend!(@ $field gate_up($crate::GateUp)); };
    (@ $field:ident add) => { $crate::forward_backend!(@ $field add($crate::Add)); };
    (@ $field:ident gather_rows) => { $crate::forward_backend!(@ $field gather_rows($crate::GatherRows)); };
    (@ $field:ident argmax) => { $crate::forward_backend!(@ $field argmax($crate::Argmax)); };
    (@ $field:ident sample) => { $crate::forward_backend!(@ $field sample($crate::Sample)); };
    (@ $field:ident $method:ident($op:ty)) => {
        fn $method(&mut self, op: &$op) -> $crate::Result<()> {
            self.$field.$method(op)
        }
    };
}
