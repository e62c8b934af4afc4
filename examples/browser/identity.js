/** Who a peer is: an Ed25519 key, and the libp2p peer id derived from it. */
import { SwarmError } from './errors.js'

// A multihash that holds the key itself: "identity", 36 bytes, the protobuf {Type: Ed25519, Data: 32 bytes}.
const PREFIX = Uint8Array.of(0x00, 0x24, 0x08, 0x01, 0x12, 0x20)
const ALPHABET = '123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz'
const STORE = 'identities'

export class Identity {
  #keys

  constructor (keys, peer) {
    this.#keys = keys
    this.peer = peer
  }

  /** A new one, gone with the page. */
  static async generate () {
    return Identity.#of(await generateKeys())
  }

  /**
   * The same at every visit; its key stays inside the browser. At a signalling service a peer is connected once, so
   * a second page of the same site gets one of its own.
   */
  static async ofThisBrowser () {
    return await holdingLock() ? Identity.#of(await keptKeys()) : Identity.generate()
  }

  static async #of (keys) {
    const raw = new Uint8Array(await crypto.subtle.exportKey('raw', keys.publicKey))
    return new Identity(keys, base58(Uint8Array.of(...PREFIX, ...raw)))
  }

  /** The 64-byte signature of `data`. */
  async sign (data) {
    return new Uint8Array(await crypto.subtle.sign('Ed25519', this.#keys.privateKey, data))
  }
}

/** Whether `peer` signed `data`. */
export async function verify (peer, data, signature) {
  const raw = unbase58(peer)
  if (raw?.length !== 38 || PREFIX.some((byte, i) => raw[i] !== byte)) return false
  try {
    const key = await crypto.subtle.importKey('raw', raw.subarray(PREFIX.length), 'Ed25519', false, ['verify'])
    return await crypto.subtle.verify('Ed25519', key, signature, data)
  } catch {
    return false // no point of the curve
  }
}

/** `12D3…a1b2c3`, as people read it. */
export function short (peer) {
  return `${peer.slice(0, 4)}…${peer.slice(-6)}`
}

async function generateKeys () {
  if (crypto.subtle == null) {
    throw new SwarmError('InputError', 'browsers make keys only for pages that came by https or from localhost')
  }
  return crypto.subtle.generateKey('Ed25519', false, ['sign', 'verify'])
}

/** Whether this page is the one that uses the kept key; it is until it is closed. */
function holdingLock () {
  return new Promise((resolve, reject) => {
    navigator.locks.request('swarmcore identity', { ifAvailable: true }, lock => {
      resolve(lock !== null)
      return lock && new Promise(() => {})
    }).catch(reject)
  })
}

async function keptKeys () {
  const opening = indexedDB.open('swarmcore', 1)
  opening.onupgradeneeded = () => opening.result.createObjectStore(STORE)
  const database = await settled(opening)
  try {
    const kept = await settled(database.transaction(STORE).objectStore(STORE).get('own'))
    if (kept) return kept
    const keys = await generateKeys()
    await settled(database.transaction(STORE, 'readwrite').objectStore(STORE).put(keys, 'own'))
    return keys
  } finally {
    database.close()
  }
}

function settled (request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result)
    request.onerror = () => reject(request.error)
  })
}

function base58 (bytes) {
  let number = bytes.reduce((value, byte) => value * 256n + BigInt(byte), 0n)
  let text = ''
  for (; number > 0n; number /= 58n) text = ALPHABET[Number(number % 58n)] + text
  return '1'.repeat(leading(bytes, 0)) + text
}

/** Null when `text` is no base58, or longer than any peer id. */
function unbase58 (text) {
  if (text.length > 64) return null
  let number = 0n
  for (const character of text) {
    const digit = ALPHABET.indexOf(character)
    if (digit < 0) return null
    number = number * 58n + BigInt(digit)
  }
  const bytes = []
  for (; number > 0n; number /= 256n) bytes.unshift(Number(number % 256n))
  return Uint8Array.of(...Array(leading(text, '1')).fill(0), ...bytes)
}

function leading (sequence, zero) {
  let count = 0
  while (sequence[count] === zero) count++
  return count
}
