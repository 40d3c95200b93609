// NF4 and double quantization in plain JavaScript, to the bit what minilora.quantize_nf4 does (tests/test_lesson_book_nf4.py).
//
// A JavaScript number is a float64.  Where the definition rounds to float32, Math.fround does; sums and products of two
// float32 numbers rounded so are what float32 hardware gives.

const SMALLEST_SCALED_ABSMAX = Math.fround(1e-38);     // below it 1 / absmax would overflow
const NESTED_BLOCKSIZE = 256;

// The midpoints of a table, in float32.
function midpoints(levels) {
  return Float32Array.from({length: levels.length - 1}, (_, i) => Math.fround(levels[i] + levels[i + 1]) / 2);
}

// The index of the nearest level; a value on the midpoint of two takes the lower one.
function nearestCode(scaled, middles) {
  let low = 0, high = middles.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (middles[middle] < scaled) low = middle + 1; else high = middle;
  }
  return low;
}

// Blocks of `blocksize` neighbours, each divided by its largest: {codes, absmax}.
function quantizeBlocks(values, levels, blocksize) {
  const codes = new Uint8Array(values.length), absmax = new Float32Array(Math.ceil(values.length / blocksize));
  const middles = midpoints(levels);
  for (let block = 0; block < absmax.length; block++) {
    const start = block * blocksize, stop = Math.min(start + blocksize, values.length);
    let largest = 0;
    for (let i = start; i < stop; i++) largest = Math.max(largest, Math.abs(values[i]));
    const inverse = Math.fround(1 / Math.max(largest, SMALLEST_SCALED_ABSMAX));
    for (let i = start; i < stop; i++) codes[i] = nearestCode(Math.fround(values[i] * inverse), middles);
    absmax[block] = largest;
  }
  return {codes, absmax};
}

function dequantizeBlocks(codes, absmax, levels, blocksize) {
  const values = new Float32Array(codes.length);        // rounds what is put into it to float32
  for (let i = 0; i < codes.length; i++) values[i] = levels[codes[i]] * absmax[Math.floor(i / blocksize)];
  return values;
}

// Double quantization: the constants less their mean, in 8 bits, 256 to a block.
function encodeAbsmax(absmax, offset = Math.fround(absmax.reduce((sum, each) => sum + each, 0) / absmax.length)) {
  const rest = Float32Array.from(absmax, each => each - offset);
  const {codes, absmax: nested} = quantizeBlocks(rest, DYNAMIC_8BIT, NESTED_BLOCKSIZE);
  return {codes, absmax: nested, offset};
}

function decodeAbsmax({codes, absmax, offset}) {
  return dequantizeBlocks(codes, absmax, DYNAMIC_8BIT, NESTED_BLOCKSIZE).map(each => each + offset);
}

// Two codes a byte, the first in the high four bits; an odd count is padded with the code of zero.
function packNibbles(codes) {
  return Uint8Array.from({length: Math.ceil(codes.length / 2)},
                         (_, i) => codes[2 * i] << 4 | (2 * i + 1 < codes.length ? codes[2 * i + 1] : 7));
}

// Float32Array -> {codes, packed, exact and used absmax, nested or null, values, bits a weight}.
//
// `offset` is what is subtracted from the constants, where it is not to be their mean as it is summed here: a sum in float32
// depends on its order, and torch's is another one.
function quantizeNF4(weights, blocksize, double, offset, blocks = quantizeBlocks(weights, NF4_CODE, blocksize)) {
  const {codes, absmax: exact} = blocks;
  const nested = double ? encodeAbsmax(exact, offset) : null;
  const absmax = double ? decodeAbsmax(nested) : exact, packed = packNibbles(codes);
  const bytes = packed.length + (double ? nested.codes.length + 4 * nested.absmax.length : 4 * absmax.length);
  return {codes, packed, exact, absmax, nested, bytes, bits: 8 * bytes / weights.length,
          values: dequantizeBlocks(codes, absmax, NF4_CODE, blocksize)};
}

// Root mean square of what quantization changed, from `start` to `stop`.
function rmsError(weights, values, start = 0, stop = weights.length) {
  let sum = 0;
  for (let i = start; i < stop; i++) sum += (values[i] - weights[i]) ** 2;
  return Math.sqrt(sum / (stop - start));
}
