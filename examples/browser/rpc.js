/** Calls and channels: what a stream is for, in records. */
import { SwarmError, within } from './errors.js'
import { decode, encode } from './msgpack.js'

const MAX_HEADER = 2 ** 20

/** Ask once: send `record`, named `kind`, as a call of `method`, and return the fields of the reply. */
export async function call (stream, method, kind, record, replyKind, timeout) {
  try {
    await stream.send(encodeMessage(kind, record, method, timeout))
    const reply = decodeMessage(await within(timeout, stream.receive(), method))
    if (reply.kind !== replyKind) throw new SwarmError('ProtocolError', `${reply.kind} in place of ${replyKind}`)
    return reply.record
  } catch (error) {
    stream.abort('the call failed')
    throw error
  } finally {
    stream.close()
  }
}

/** Records both ways over one stream. */
export class Channel {
  #stream

  constructor (stream) {
    this.#stream = stream
  }

  /** Begin `method` with its opening record. */
  static async open (stream, method, kind, record) {
    await stream.send(encodeMessage(kind, record, method))
    return new Channel(stream)
  }

  send (kind, record) {
    return this.#stream.send(encodeMessage(kind, record))
  }

  /** The next `{kind, record}`. Throws the peer's error when it failed, or when nothing comes within `timeout` seconds. */
  async receive (timeout) {
    return decodeMessage(await within(timeout, this.#stream.receive(), 'waiting for the peer'))
  }

  close () {
    return this.#stream.close()
  }

  abort (reason) {
    this.#stream.abort(reason)
  }
}

function encodeMessage (kind, record, method = '', timeout = null) {
  const header = encode([kind, record, [], method, timeout])
  const message = new Uint8Array(4 + header.length)
  new DataView(message.buffer).setUint32(0, header.length, true)
  message.set(header, 4)
  return message
}

function decodeMessage (message) {
  if (message == null) throw new SwarmError('ConnectionLostError', 'the peer ended without an answer')
  const length = message.length < 4 ? 0 : new DataView(message.buffer, message.byteOffset).getUint32(0, true)
  if (length > MAX_HEADER || 4 + length > message.length) {
    throw new SwarmError('ProtocolError', 'a message is shorter than its header')
  }
  const header = decode(message.subarray(4, 4 + length))
  const [kind, record] = Array.isArray(header) ? header : []
  if (typeof kind !== 'string' || record?.constructor !== Object) {
    throw new SwarmError('ProtocolError', 'a message without a record')
  }
  if (kind === 'Failure') throw new SwarmError(String(record.error), String(record.message ?? ''))
  return { kind, record }
}
