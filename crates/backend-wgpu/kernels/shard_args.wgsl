  chunks: u32, rows: u32, lanes: u32, out_offset: u32, out_stride: u32, out_matrix_step: u32, num_tokens: u32,
  first_row: u32, first_matrix: u32, num_matrices: u32, matrix_rows: u32,   // of this shard; rows of the whole weight
  bias_offset: u32, bias_offset2: u32,
  has: u32,              // bits: bias, global scale, those of the second weight of a pair, out is added to
  block_columns: u32,    // columns that share a scale, where they are more than a chunk
  scale_words: u32,      // words of scales a row
  activation: u32, alpha: f32, limit: f32,
