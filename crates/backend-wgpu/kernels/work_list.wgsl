// The distinct experts of a batch as a list of work: items of at most `item_rows` choices of one expert.
// list: [number of items, -, -, -], items {expert, first, count, -} from word 4 on, choices sorted by expert from `sorted_offset` on.
// A choice is token * top_k + i. One workgroup; the order of everything is that of experts and choices. Four numbers at a time, so that
// their loads do not wait for each other.
struct Args { ids_offset: u32, ids_stride: u32, num_tokens: u32, top_k: u32, num_experts: u32, item_rows: u32, sorted_offset: u32 }
var<immediate> args: Args;
@group(0) @binding(0) var<storage, read_write> ids: array<u32>;
@group(0) @binding(1) var<storage, read_write> list: array<u32>;

const MAX_EXPERTS: u32 = 1024u;
const TILE: u32 = 1024u;
var<workgroup> counts: array<u32, MAX_EXPERTS + 4u>;
var<workgroup> items: array<u32, MAX_EXPERTS + 4u>;   // of each expert
var<workgroup> nexts: array<u32, MAX_EXPERTS>;        // where its next choice goes
var<workgroup> chosen: array<vec4<u32>, 256>;         // experts of some choices in a row; no expert behind the last

fn load_tile(start: u32, num_choices: u32, local: u32) {
  workgroupBarrier();
  var four = vec4<u32>(0xffffffffu);
  for (var k = 0u; k < 4u; k++) {
    let choice = start + 4u * local + k;
    if (choice < num_choices) { four[k] = ids[args.ids_offset + (choice / args.top_k) * args.ids_stride + choice % args.top_k]; }
  }
  chosen[local] = four;
  workgroupBarrier();
}

fn ones(here: vec4<bool>) -> vec4<u32> { return select(vec4<u32>(), vec4<u32>(1u), here); }

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
  let num_choices = args.num_tokens * args.top_k;
  for (var expert = local; expert < args.num_experts; expert += 256u) { counts[expert] = 0u; }
  for (var start = 0u; start < num_choices; start += TILE) {
    load_tile(start, num_choices, local);
    let fours = (min(TILE, num_choices - start) + 3u) / 4u;
    for (var expert = local; expert < args.num_experts; expert += 256u) {
      var found = vec4<u32>();
      for (var i = 0u; i < fours; i++) { found += ones(chosen[i] == vec4<u32>(expert)); }
      counts[expert] += found.x + found.y + found.z + found.w;
    }
  }
  for (var expert = local; expert < args.num_experts; expert += 256u) {
    items[expert] = (counts[expert] + args.item_rows - 1u) / args.item_rows;
  }
  workgroupBarrier();
  for (var expert = local; expert < args.num_experts; expert += 256u) {
    var first = 0u;
    var item = 0u;
    for (var other = 0u; other < expert; other += 4u) {
      let is_before = ones(vec4<u32>(other, other + 1u, other + 2u, other + 3u) < vec4<u32>(expert));
      first += dot(is_before, vec4<u32>(counts[other], counts[other + 1u], counts[other + 2u], counts[other + 3u]));
      item += dot(is_before, vec4<u32>(items[other], items[other + 1u], items[other + 2u], items[other + 3u]));
    }
    nexts[expert] = first;
    let end = first + counts[expert];
    for (var start = first; start < end; start += args.item_rows) {
      list[4u + 4u * item] = expert;
      list[5u + 4u * item] = start;
      list[6u + 4u * item] = min(args.item_rows, end - start);
      item++;
    }
    if (expert + 1u == args.num_experts) { list[0] = item; }
  }
  for (var start = 0u; start < num_choices; start += TILE) {
    // The last tile is still there.
    if (num_choices > TILE) { load_tile(start, num_choices, local); }
    let fours = (min(TILE, num_choices - start) + 3u) / 4u;
    for (var expert = local; expert < args.num_experts; expert += 256u) {
      var at = nexts[expert];
      for (var i = 0u; i < fours; i++) {
        let four = chosen[i];
        for (var k = 0u; k < 4u; k++) {
          if (four[k] == expert) {
            list[args.sorted_offset + at] = start + 4u * i + k;
            at++;
          }
        }
      }
      nexts[expert] = at;
    }
  }
}
