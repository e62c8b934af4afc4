/** One peer connection to one peer, and a data channel in it for each stream. */
import { SwarmError, within } from './errors.js'
import { FramedStream } from './framed.js'
import { short } from './identity.js'

const LABEL = '/swarmcore/stream/1'
const CONNECT_TIMEOUT = 15
const GATHER_TIMEOUT = 5

export class Connection {
  #rtc

  constructor (peer, iceServers) {
    this.peer = peer
    this.#rtc = new RTCPeerConnection({ iceServers })
    // Both sides know of it without a word: an offer needs one channel, and this one is open at once.
    this.#rtc.createDataChannel('swarmcore', { negotiated: true, id: 0 })
  }

  /** Throws a PeerUnreachableError, or what the peer or the signalling service has to say. */
  static async dial (peer, signalling, iceServers = []) {
    const connection = new Connection(peer, iceServers)
    try {
      await connection.#connect(signalling)
    } catch (error) {
      connection.close()
      throw error
    }
    return connection
  }

  get alive () {
    return this.#rtc.connectionState === 'connected' || this.#rtc.connectionState === 'disconnected'
  }

  /** A new stream. */
  async openStream () {
    if (!this.alive) throw new SwarmError('ConnectionLostError', `the connection to ${short(this.peer)} broke`)
    return FramedStream.open(this.#rtc.createDataChannel(LABEL))
  }

  close () {
    this.#rtc.close()
  }

  async #connect (signalling) {
    const rtc = this.#rtc
    const connected = new Promise((resolve, reject) => {
      rtc.onconnectionstatechange = () => {
        if (rtc.connectionState === 'connected') resolve()
        if (rtc.connectionState === 'failed') {
          reject(new SwarmError('PeerUnreachableError', `no path to ${short(this.peer)} was found`))
        }
      }
    })
    connected.catch(() => {}) // the exchange may fail first
    await rtc.setLocalDescription()
    await gathered(rtc)
    const early = [] // candidates may come before the answer is taken
    let add = candidate => early.push(candidate)
    const answer = await signalling.exchange(this.peer, rtc.localDescription.sdp, candidate => add(candidate))
    try {
      await rtc.setRemoteDescription({ type: 'answer', sdp: answer })
      add = candidate => addCandidate(rtc, candidate)
      early.forEach(add)
      await within(CONNECT_TIMEOUT, connected, `connecting to ${short(this.peer)}`)
    } finally {
      signalling.forget(this.peer)
    }
  }
}

/** One of the peer's; nonsense, or one that comes too late, does no harm. */
function addCandidate (rtc, candidate) {
  const init = candidate.startsWith('candidate:') ? { candidate, sdpMLineIndex: 0 } : null
  rtc.addIceCandidate(init).catch(error => console.debug('left out a candidate:', error))
}

/** The description is sent whole, with all candidates; those that a slow STUN server still brings are left out. */
async function gathered (rtc) {
  const complete = new Promise(resolve => {
    const look = () => rtc.iceGatheringState === 'complete' && resolve()
    rtc.onicegatheringstatechange = look
    look()
  })
  await within(GATHER_TIMEOUT, complete, 'looking for addresses').catch(() => {})
}
