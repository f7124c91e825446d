//! Sources of weights that wrap another one and change a few of its methods hand the others on, with [`forward_weights!`].

/// Methods of [`WeightProvider`](crate::provider::WeightProvider) that call the same method of a field, by name:
/// `forward_weights!(checkpoint: vector has)` stands in an `impl WeightProvider` whose type has a field `checkpoint` that is a source of
/// weights, boxed or borrowed. What is not named stays to be written, or has the trait's default.
#[macro_export]
macro_rules! forward_weights {
    ($field:ident: $($method:ident)*) => { $($crate::forward_weights!(@ $field $method);)* };
    (@ $field:ident vector) => {
        fn vector(&self, name: &str, len: usize) -> $crate::Result<Vec<f32>> {
            $crate::provider::WeightProvider::vector(self.$field, name, len)
        }
    };
    (@ $field:ident num_experts) => {
        fn num_experts(&self, path: &str) -> $crate::Result<usize> {
            $crate::provider::WeightProvider::num_experts(self.$field, path)
        }
    };
    (@ $field:ident expert_biases) => {
        fn expert_biases(
            &self,
            path: &str,
            projection: moellon_checkpoint::Projection,
            rows: usize,
        ) -> $crate::Result<Option<Vec<f32>>> {
            $crate::provider::WeightProvider::expert_biases(self.$field, path, projection, rows)
        }
    };
    (@ $field:ident mla_kv_b) => {
        fn mla_kv_b(
            &self,
            path: &str,
            shape: moellon_checkpoint::MlaShape,
        ) -> $crate::Result<$crate::provider::KvB<'_>> {
            $crate::provider::WeightProvider::mla_kv_b(self.$field, path, shape)
        }
    };
    (@ $field:ident fused_kv_b_format) => {
        fn fused_kv_b_format(
            &self,
            path: &str,
            shape: moellon_checkpoint::MlaShape,
        ) -> $crate::Result<Option<moellon_tensor::WeightFormat>> {
            $crate::provider::WeightProvider::fused_kv_b_format(self.$field, path, shape)
        }
    };
    (@ $field:ident has) => {
        fn has(&self, name: &str) -> bool {
            $crate::provider::WeightProvider::has(self.$field, name)
        }
    };
    (@ $field:ident release) => {
        fn release(&self, matrices: &[moellon_tensor::MatrixView<'_>]) {
            $crate::provider::WeightProvider::release(self.$field, matrices);
        }
    };
}
