/**
 * msgpack, as far as swarmcore's records need it.
 *
 * Whole numbers are integers on the wire and exact up to 2^53, all others float64. Objects are maps with text for keys.
 * Extension types are refused.
 */
import { SwarmError } from './errors.js'

const MAX_DEPTH = 32
const encoder = new TextEncoder()
const decoder = new TextDecoder('utf-8', { fatal: true })

/** The bytes of `value`. */
export function encode (value) {
  const writer = new Writer()
  writer.value(value)
  return writer.bytes()
}

/** The inverse of `encode`. Throws a ProtocolError unless `bytes` are exactly one value. */
export function decode (bytes) {
  const reader = new Reader(bytes)
  const value = reader.value(0)
  if (reader.left > 0) throw malformed(`${reader.left} bytes are left over`)
  return value
}

class Writer {
  #buffer = new Uint8Array(256)
  #view = new DataView(this.#buffer.buffer)
  #length = 0

  bytes () {
    return this.#buffer.slice(0, this.#length)
  }

  value (value) {
    if (value == null) this.#byte(0xc0)
    else if (typeof value === 'boolean') this.#byte(value ? 0xc3 : 0xc2)
    else if (typeof value === 'number') this.#number(value)
    else if (typeof value === 'string') this.#text(encoder.encode(value))
    else if (value instanceof Uint8Array) this.#binary(value)
    else if (Array.isArray(value)) this.#array(value)
    else this.#map(Object.entries(value))
  }

  #number (value) {
    if (!Number.isSafeInteger(value)) {
      this.#byte(0xcb)
      this.#room(8, at => this.#view.setFloat64(at, value))
    } else if (value >= 0) {
      if (value < 0x80) this.#byte(value)
      else if (value < 2 ** 32) this.#sized(0xce, value)
      else this.#wide(0xcf, value)
    } else if (value >= -32) {
      this.#byte(value & 0xff)
    } else {
      this.#wide(0xd3, value)
    }
  }

  #wide (tag, value) {
    this.#byte(tag)
    this.#room(8, at => this.#view.setBigInt64(at, BigInt(value)))
  }

  #text (bytes) {
    if (bytes.length < 32) this.#byte(0xa0 | bytes.length)
    else this.#sized(0xdb, bytes.length)
    this.#copy(bytes)
  }

  #binary (bytes) {
    this.#sized(0xc6, bytes.length)
    this.#copy(bytes)
  }

  #array (values) {
    if (values.length < 16) this.#byte(0x90 | values.length)
    else this.#sized(0xdd, values.length)
    for (const value of values) this.value(value)
  }

  #map (entries) {
    if (entries.length < 16) this.#byte(0x80 | entries.length)
    else this.#sized(0xdf, entries.length)
    for (const [key, value] of entries) {
      this.value(key)
      this.value(value)
    }
  }

  #byte (value) {
    this.#room(1, at => this.#view.setUint8(at, value))
  }

  #sized (tag, value) {
    this.#byte(tag)
    this.#room(4, at => this.#view.setUint32(at, value))
  }

  #copy (bytes) {
    this.#room(bytes.length, at => this.#buffer.set(bytes, at))
  }

  /** `fill` so many bytes from the place it is given on; by then the buffer may be another one. */
  #room (count, fill) {
    const at = this.#length
    this.#length += count
    if (this.#length > this.#buffer.length) {
      const larger = new Uint8Array(2 * this.#length)
      larger.set(this.#buffer)
      this.#buffer = larger
      this.#view = new DataView(larger.buffer)
    }
    fill(at)
  }
}

class Reader {
  constructor (bytes) {
    this.bytes = bytes
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
    this.at = 0
  }

  get left () {
    return this.bytes.length - this.at
  }

  value (depth) {
    if (depth > MAX_DEPTH) throw malformed('it is nested too deeply')
    const tag = this.#uint(1)
    if (tag < 0x80) return tag
    if (tag < 0x90) return this.#map(tag & 0x0f, depth)
    if (tag < 0xa0) return this.#array(tag & 0x0f, depth)
    if (tag < 0xc0) return this.#text(tag & 0x1f)
    if (tag >= 0xe0) return tag - 0x100
    switch (tag) {
      case 0xc0: return null
      case 0xc2: return false
      case 0xc3: return true
      case 0xc4: case 0xc5: case 0xc6: return this.#take(this.#uint(1 << (tag - 0xc4)))
      case 0xca: return this.view.getFloat32(this.#skip(4))
      case 0xcb: return this.view.getFloat64(this.#skip(8))
      case 0xcc: case 0xcd: case 0xce: case 0xcf: return this.#uint(1 << (tag - 0xcc))
      case 0xd0: return this.view.getInt8(this.#skip(1))
      case 0xd1: return this.view.getInt16(this.#skip(2))
      case 0xd2: return this.view.getInt32(this.#skip(4))
      case 0xd3: return Number(this.view.getBigInt64(this.#skip(8)))
      case 0xd9: case 0xda: case 0xdb: return this.#text(this.#uint(1 << (tag - 0xd9)))
      case 0xdc: case 0xdd: return this.#array(this.#uint(2 << (tag - 0xdc)), depth)
      case 0xde: case 0xdf: return this.#map(this.#uint(2 << (tag - 0xde)), depth)
      default: throw malformed(`0x${tag.toString(16)} has no place there`)
    }
  }

  #uint (width) {
    const at = this.#skip(width)
    if (width === 1) return this.view.getUint8(at)
    if (width === 2) return this.view.getUint16(at)
    return width === 4 ? this.view.getUint32(at) : Number(this.view.getBigUint64(at))
  }

  #array (count, depth) {
    if (count > this.left) throw malformed(`it ends before its ${count} values`)
    const values = []
    for (let i = 0; i < count; i++) values.push(this.value(depth + 1))
    return values
  }

  #map (count, depth) {
    if (2 * count > this.left) throw malformed(`it ends before its ${count} entries`)
    const entries = []
    for (let i = 0; i < count; i++) {
      const key = this.value(depth + 1)
      if (typeof key !== 'string') throw malformed('a key is no text')
      entries.push([key, this.value(depth + 1)])
    }
    return Object.fromEntries(entries)
  }

  #text (length) {
    const bytes = this.#take(length)
    try {
      return decoder.decode(bytes)
    } catch {
      throw malformed('a text is not UTF-8')
    }
  }

  #take (length) {
    const at = this.#skip(length)
    return this.bytes.subarray(at, at + length)
  }

  #skip (length) {
    if (length > this.left) throw malformed('it ends too early')
    const at = this.at
    this.at += length
    return at
  }
}

function malformed (what) {
  return new SwarmError('ProtocolError', `a malformed record came: ${what}`)
}
